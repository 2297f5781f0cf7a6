"""Shards and settings of the runs whose start is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.data.pack import synthetic

SAMPLES = 24
"""Samples of a shard."""


def write_shards(folder: Path, count: int) -> Path:
    """Writes a set of so many small shards, unless it is there; all have the same bytes.

    Returns:
        Its folder.
    """
    data, one = folder / f"shards-{count}", folder / "one"
    if not one.exists():
        synthetic.write(one, train=SAMPLES, val=1, size=32, seed=0, samples_per_shard=SAMPLES)
    content = next(one.glob("*train-*.tar")).read_bytes()
    if not data.exists():
        data.mkdir()
        for number in range(count):
            (data / f"train-{number:05d}.tar").write_bytes(content)
    return data


def settings(root: Path, shards: str, ranks: int, index: Path, run: Path) -> dict[str, Any]:
    """The settings of a run of two steps, with the keys of a checkout."""
    old = (root / "pipeline" / "settings.py").exists()  # before the keys were renamed
    sizes = (
        {"width": 32, "depth": 1, "heads": 2, "patch": 8}
        if old
        else {**{"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}}
    )
    train = {"global_batch": 16, "length": "2 steps"} if old else {"global_batch_size": 16, "duration": "2 steps"}
    method = {"name": "simclr", "views": {"global_size": 32}, "head_hidden": 32, "head_out": 16}
    return {
        "run": {"name": "startup", "directory": str(run), "seed": 0},
        "recipe" if old else "method": method,
        "model": sizes,
        "data": {"shards": shards, "index": str(index), "workers" if old else "num_workers": 0},
        "train": {**train, "precision": "fp32", "log_every": 1, "threads": 1},
        "checkpoint": {"every": "2 steps"},
        "tracking": {"enabled": False},
        "launch": {"ranks" if old else "num_processes": ranks, "backend": "gloo"},
    }
