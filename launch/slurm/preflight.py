"""Checks one node before ranks are started on it. Standard library only.

``python -m launch.slurm.preflight OPTIONS``, one task per node; ``problems`` and measurements are written to
``<folder>/<node>.json``.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def look(options: dict[str, Any]) -> dict[str, Any]:
    """Check this node.

    Args:
        options: ``gpus`` a node should have, ``run`` directory, ``disk_gb`` of free space for it and the temporary folder,
            ``seconds`` this may take.

    Returns:
        ``problems``; ``full``, whether they are only that space lacks; ``seen``, measurements; ``began`` and ``ended`` by this
        node's clock, which the supervisor compares with its own.
    """
    began = time.time()
    problems: list[str] = []
    seen: dict[str, Any] = {}
    full, lacking = _disk("run", Path(options["run"]), float(options["disk_gb"]), seen)
    temporary, _ = _disk(
        "temporary folder", Path(os.environ.get("TMPDIR") or tempfile.gettempdir()), float(options["disk_gb"]), seen
    )
    problems += [*full, *temporary]
    lacking = lacking and len(problems) == len(full) + len(temporary)
    if options["gpus"]:
        problems += _gpus(int(options["gpus"]), float(options["seconds"]), seen)
    return {"problems": problems, "full": lacking, "seen": seen, "began": began, "ended": time.time()}


def is_full(folder: Path) -> bool:
    """Whether nothing can be written to a folder since its disk or the user's quota is full."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".fovea-space-") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def _disk(name: str, folder: Path, required: float, seen: dict[str, Any]) -> tuple[list[str], bool]:
    """Problems of a folder, and whether it lacks space."""
    try:
        free = shutil.disk_usage(folder).free / 1e9
        nodes = os.statvfs(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".fovea-preflight-") as file:
            file.write(b"can be written")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [f"the {name} cannot be written ({folder}: {error.strerror})"], error.errno in (errno.ENOSPC, errno.EDQUOT)
    seen[f"{name} free GB"] = round(free, 1)
    if free < required:
        return [f"the {name} has {free:.1f} GB free of {required:g} required ({folder})"], True
    if nodes.f_files and nodes.f_favail < 1000:
        return [f"the {name} has {nodes.f_favail} inodes left ({folder})"], True
    return [], False


def _gpus(required: int, limit: float, seen: dict[str, Any]) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return [f"{required} GPUs are required and there is no nvidia-smi"]
    query = ["nvidia-smi", "--query-gpu=index,name,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi does not answer in {limit:.0f} s"]
    lines = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    seen["gpus"] = [line[1] for line in lines if len(line) > 1]
    problems = [
        f"GPU {line[0]} has {line[2]} uncorrected memory errors"
        for line in lines
        if len(line) > 2 and line[2].isdigit() and int(line[2])
    ]
    if done.returncode or len(lines) < required:
        problems.append(f"{len(lines)} of {required} GPUs respond")
    return problems


def main() -> int:
    """Entry of ``python -m launch.slurm.preflight``."""
    options = json.loads(sys.argv[1])
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    path = Path(options["folder"]) / f"{node}.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(look(options)))
    temporary.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
