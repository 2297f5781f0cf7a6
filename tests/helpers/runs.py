"""A run small enough for a test: scenes of 32 pixels, a tower of one block, two ranks, everything else as in a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
