"""Ten steps of seven methods, recorded: a refactoring is proven by the same samples, pixels, losses and weights.

    python -m tests.golden_runs            compare with what is kept in tests/golden
    python -m tests.golden_runs --record   keep what this machine computes

Keys are equal everywhere. Pixels, losses and weights are equal bit for bit on the processor and the versions that the record
names, and within rounding elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.helpers.runs import recorded, train

FOLDER = Path(__file__).resolve().parent / "golden"
METHODS = ("dinov2", "clip", "detailclip", "simclr", "mocov2", "byol", "coca")
STEPS, HALF = 10, 5


def machine() -> dict[str, str]:
    """What results may depend on in their last bits."""
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), ""
    )
    flags = hashlib.sha256(model.encode()).hexdigest()[:12]
    versions = {name: version(name) for name in ("torch", "numpy", "deepspeed", "timm", "nvidia-dali-cuda130")}
    return {"machine": platform.machine(), "processor": flags, "python": platform.python_version(), **versions}


def run(method: str, ranks: int, shards: str, folder: Path) -> dict[str, Any]:
    """Trains a method for ten steps, again from its fifth step, and returns what both recorded.

    Raises:
        AssertionError: the training failed, or the resumed half differs from the whole.
    """
    config, directory = FOLDER / f"{method}.yaml", folder / f"{method}-{ranks}"
    words = (f"launch.num_processes={ranks}",)
    done = train(config, shards, directory, *words)
    assert done.returncode == 0, done.stderr + done.stdout
    whole = _record(directory, ranks)
    shutil.rmtree(directory / "checkpoints" / f"step_{STEPS:09d}")
    again = train(config, shards, directory, *words)
    assert again.returncode == 0 and f"resuming at step {HALF}" in again.stdout, again.stderr + again.stdout
    assert _record(directory, ranks) == whole, f"{method} on {ranks} ranks resumes otherwise"
    return whole


def _record(directory: Path, ranks: int) -> dict[str, Any]:
    rows = [recorded(directory, rank) for rank in range(ranks)]
    assert all(sorted(steps) == list(range(STEPS)) for steps in rows)
    return {
        "keys": [[_digest(json.dumps(row["keys"])) for _, row in sorted(steps.items())] for steps in rows],
        "pixels": [[row["pixels"] for _, row in sorted(steps.items())] for steps in rows],
        "terms": [[row["terms"] for _, row in sorted(steps.items())] for steps in rows],
        "weights": _weights(directory / "checkpoints" / f"step_{STEPS:09d}"),
    }


def _weights(checkpoint: Path) -> dict[str, str]:
    digests: dict[str, str] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        total = hashlib.sha256()
        with safe_open(path, framework="np") as file:
            for key in sorted(file.keys()):
                total.update(key.encode() + file.get_tensor(key).tobytes())
        digests[path.name] = total.hexdigest()[:16]
    return digests


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kept(method: str) -> dict[str, Any]:
    """What is kept of a method: ``machine``, and a record for each number of ranks."""
    record: dict[str, Any] = json.loads((FOLDER / f"{method}.json").read_text())
    return record


def differences(method: str, ranks: int, now: dict[str, Any]) -> list[str]:
    """What differs from the record: bit for bit on the machine that made it, else keys exactly and losses within rounding."""
    record = kept(method)
    before, exact = record[str(ranks)], record["machine"] == machine()
    wrong = [name for name in ("keys", *(("pixels", "terms", "weights") if exact else ())) if now[name] != before[name]]
    for step, rows in enumerate(zip(now["terms"][0], before["terms"][0], strict=True)):
        ours, theirs = ({name: float.fromhex(value) for name, value in row.items()} for row in rows)
        # Of neighbours that are equally near, rounding chooses KoLeo's.
        close = {name: 0.1 if step else 1e-2 if name == "koleo" else 1e-3 for name in theirs}
        if ours.keys() != theirs.keys() or any(abs(ours[k] - theirs[k]) > close[k] * max(1.0, abs(theirs[k])) for k in theirs):
            wrong.append(f"terms of step {step}: {ours}, kept {theirs}")
    return wrong


def main() -> int:
    """Records or compares all methods; 1 if anything differs."""
    from pipeline.data.pack import synthetic as scenes

    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes.write(folder / "scenes", train=120, val=24, size=32, seed=3, samples_per_shard=40)
        for method in METHODS:
            runs = {str(ranks): run(method, ranks, str(folder / "scenes" / "*train-*.tar"), folder) for ranks in (1, 2)}
            if "--record" in sys.argv:
                record = {"machine": machine(), **runs}
                (FOLDER / f"{method}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
                print(f"{method}: recorded", flush=True)
                continue
            wrong = [f"{ranks} ranks: {what}" for ranks, now in runs.items() for what in differences(method, int(ranks), now)]
            failed += bool(wrong)
            print(f"{method}: {'; '.join(wrong) or 'equal'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
