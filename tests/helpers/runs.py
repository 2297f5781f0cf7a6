"""A run small enough for a test: scenes of 32 pixels, a tower of one block, two ranks, everything else as in a real run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

TOY = """
run: {name: toy, seed: 7}
method:
  name: dinov2
  views: {global_size: 32, local_count: 2, local_size: 16}
  augment: {hue_space: yiq}
  prototypes: 32
  head_hidden: 32
  head_bottleneck: 16
  freeze_last_layer: 2 steps
model: {embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, drop_path: 0.1}
data: {num_workers: 0, canonical_streams: 4, shuffle_block_size: 64}
schedule:
  lr: {peak: 1e-2, warmup: 4 steps}
  teacher_momentum: {start: 0.9, end: 1.0}
  teacher_temperature: {start: 0.04, peak: 0.07, warmup: 6 steps, shape: constant}
train: {global_batch_size: 16, duration: 24 steps, precision: fp32, record_batches: true, log_every: 1, threads: 1}
checkpoint: {every: 6 steps, keep_last: 2}
tracking: {enabled: false}
launch: {num_processes: 2}
"""


def environment() -> dict[str, str]:
    """This process's, with the checkout importable."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(config: Path, shards: str, directory: Path, *overrides: str) -> list[str]:
    """The words of ``fovea train`` for a toy run."""
    words = [
        sys.executable,
        "-m",
        "launch.cli.main",
        "train",
        str(config),
        f"data.shards={shards}",
        f"run.directory={directory}",
    ]
    return [*words, f"data.index={directory.parent / 'index'}", *overrides]


def started_and_held(words: list[str], step: int, rank: int = 0, *, attempt: int = 0, **streams: Any) -> subprocess.Popen[bytes]:
    """Start a command of ``fovea train`` whose rank does a step of an attempt only when it has received a signal."""
    module = "launch.rank_main" if "launch.rank_main" in words else "launch.cli.main"
    return subprocess.Popen(
        ["tests.helpers.faulty_ranks" if word == module else word for word in words],
        env=environment() | {"FAULT": f"{';' * attempt}{rank} {step} forward hold;"},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        **({"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | streams),
    )


def processes_of(directory: Path) -> list[int]:
    """The processes of a run's ranks, also of those forked from one process, which have its command line."""
    beating = set()
    for path in directory.glob("logs/attempt-*/pulse/rank-*.json"):
        with contextlib.suppress(ValueError, OSError):  # rewritten in place
            beating.add(int(json.loads(path.read_text())["pid"]))
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _is_of(entry, directory, beating)]


def _is_of(process: Path, directory: Path, beating: set[int]) -> bool:
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        if {"launch.rank_main", "tests.helpers.faulty_ranks"} & set(words) and str(directory / "config.json") in words:
            return True
        if not (process / "comm").read_text().startswith("fovea-rank"):
            return False
        opened = [os.readlink(one) for one in (process / "fd").iterdir()]
    except OSError:
        return False
    return bool(opened) and (int(process.name) in beating or any(one.startswith(f"{directory}/") for one in opened))


def wait_for_step(directory: Path, step: int, launcher: subprocess.Popen[bytes], seconds: float = 2000) -> None:
    """Until rank 0 has recorded a step."""
    end = time.monotonic() + seconds
    while max(recorded(directory, 0), default=-1) < step:
        assert launcher.poll() is None, f"the run ended before step {step}"
        assert time.monotonic() < end, f"step {step} was not reached in {seconds} s"
        time.sleep(0.02)


def train(config: Path, shards: str, directory: Path, *overrides: str, timeout: float = 3000) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        command(config, shards, directory, *overrides),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def recorded(directory: Path, rank: int) -> dict[int, dict[str, Any]]:
    """Each step's keys, pixel digest and terms on one rank; a step that was done twice must have been the same."""
    steps: dict[int, dict[str, Any]] = {}
    for path in sorted((directory / "batches").glob(f"attempt-*-rank-{rank}.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # torn by the kill
                continue
            if row["step"] in steps:
                assert steps[row["step"]] == row, f"step {row['step']} was not repeated exactly"
            steps[row["step"]] = row
    return steps


def weights(directory: Path, step: int) -> dict[str, bytes]:
    """Every file of tensors of a checkpoint, by name."""
    folder = directory / "checkpoints" / f"step_{step:09d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
