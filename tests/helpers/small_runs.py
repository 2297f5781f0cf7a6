"""Labelled scenes and a config of seconds, for tests of commands that train several runs."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.pack import synthetic as scenes

CONFIG = """
run: {name: toy}
method: {name: simclr, views: {global_size: 16}, head_hidden: 16, head_out: 8}
model: {embed_dim: 16, depth: 1, num_heads: 2, patch_size: 8, layer_scale: null}
data: {shards: none.tar, num_workers: 0, canonical_streams: 4, shuffle_block_size: 64}
schedule: {lr: {peak: 1e-2, warmup: 2 steps}}
train: {global_batch_size: 8, duration: 12 steps, precision: fp32, threads: 1, log_every: 4}
checkpoint: {every: 2 steps, keep_last: 9}
evaluation: {log_images: false, knn: {enabled: true, every: 12 steps, k: [3]}}
launch: {num_processes: 1}
"""


def make(folder: Path) -> Path:
    """Write ``scenes/`` and ``toy.yaml`` into a folder."""
    scenes.write(folder / "scenes", train=48, val=20, size=32, seed=3)
    (folder / "toy.yaml").write_text(CONFIG)
    return folder


def words(folder: Path) -> list[str]:
    """The config and the places of its data, for a command line."""
    return [str(folder / "toy.yaml"), f"data.shards={folder}/scenes/*train-*.tar", f"data.index={folder / 'index'}"]
