"""Opens the data set of :mod:`tests.helpers.library` again and again, and reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import ShardDataset

BATCH = 8


class Opener:
    """Opens the data set with the same settings again and again."""

    def __init__(self, folder: Path, index: Path) -> None:
        self.folder, self.index = folder, index
        self.objects: dict[Any, ShardDataset] = {}

    def __call__(self, **options: Any) -> ShardDataset:
        shards = [str(self.folder / "a-*.tar")] if "sources" not in options else ()
        return ShardDataset(shards, **{"global_batch_size": BATCH, "seed": 5, "index": str(self.index), **options})

    def kept(self, mixed: bool, **options: Any) -> ShardDataset:
        """The same object for the same options: opening one takes a hundredth of a second."""
        key = (mixed, *sorted(options.items()))
        if key not in self.objects:
            self.objects[key] = self.mixture(**options) if mixed else self(**options)
        return self.objects[key]

    def mixture(self, **options: Any) -> ShardDataset:
        sets = [{"name": name, "shards": f"{self.folder}/{name}-*.tar", "weight": w} for name, w in (("a", 3), ("b", 1))]
        return self(sources=sets, canonical_streams=4, **options)


def keys_in_order(dataset: ShardDataset, steps: int) -> list[str]:
    order, manifest = dataset.source.order, dataset.source.manifest
    ids = np.concatenate([order.batch(step).ids for step in range(steps)]).tolist()
    return [manifest.rows(number >> 32).keys[number & 0xFFFFFFFF] for number in ids]


def is_bad(one: dict[str, Any]) -> bool:
    return bool(one["__bad__"])
