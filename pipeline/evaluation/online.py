"""k-NN while training goes on: all ranks share the work, and the training's random state is not touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.feeder import Portions
from pipeline.data.ledger import Ledger
from pipeline.data.manifest import Manifest
from pipeline.data.order import GlobalBatch
from pipeline.data.random import permutation
from pipeline.data.reader import Reader
from pipeline.data.stream import BatchStream, StreamOptions
from pipeline.data.views import ViewSpec
from pipeline.errors import DataError
from pipeline.evaluation.knn import knn_accuracy

Features = Callable[[Tensor], Tensor]
_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class FixedList:
    """An order that shows a list of samples once, in chunks; the last one is shorter."""

    ids: NDArray[np.uint64]
    global_batch: int

    def rank_batch(self, step: int, world: int, rank: int) -> GlobalBatch:
        """The chunk of a step; the list was already dealt to the ranks."""
        ids = self.ids[step * self.global_batch : (step + 1) * self.global_batch]
        return GlobalBatch(ids, np.zeros(len(ids), dtype=np.int64))

    def __len__(self) -> int:
        return -(-len(self.ids) // self.global_batch)


class Pictures:
    """The evaluation views of (a subset of) a labelled data set: this rank's share, cached when small.

    Args:
        manifest: the labelled shards.
        size: side of the view, pixels.
        centre: side of the centre square as a share of the shorter side.
        most: at most so many samples, chosen by ``seed``; ``None`` takes all.
        batch: pictures of one forward pass.
        rank, world: this rank's place.
        device: where views go.
        seed: of the choice.
        threads: decode threads.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        size: int,
        most: int | None,
        batch: int,
        rank: int,
        world: int,
        device: torch.device,
        centre: float = 1.0,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        ids = manifest.ids()
        if most is not None and most < len(ids):
            ids = ids[np.sort(permutation(len(ids), seed, 0xE7A1)[:most])]
        self.total = len(ids)
        self._spec = ViewSpec("image", 1, size, None, centre=centre)
        self._order = FixedList(ids[rank::world], batch)
        self._reader, self._device, self._threads = Reader(manifest, wants=("image", "label")), device, threads
        self._keep = len(self._order.ids) * size * size * 12 <= _CACHE_BYTES
        self._cached: list[tuple[Tensor, Tensor]] | None = None

    def __iter__(self):  # type: ignore[no-untyped-def]
        """Yield ``(images [n, 3, size, size], labels [n])``; samples without a label are left out."""
        if self._cached is not None:
            yield from self._cached
            return
        dataset = Portions(self._reader, self._order, (self._spec,), seed=0, world=1, rank=0)
        options = StreamOptions(micro_batch=self._order.global_batch, workers=0, threads=self._threads, hue="off")
        stream = BatchStream(
            dataset, device=self._device, options=options, ledger=Ledger(None, budget=1.0), first=0, last=len(self._order)
        )
        seen = []
        for _, (batch,) in stream:
            kept = batch.labels >= 0
            pair = (batch.views["image"][0][kept], batch.labels[kept])
            if self._keep:
                seen.append(pair)
            yield pair
        if self._keep:
            self._cached = seen


class OnlineKnn:
    """k-NN accuracy of a feature function, the bank gathered from all ranks, the queries shared out.

    Args:
        bank: labelled pictures that vote.
        queries: labelled pictures to judge.
        ks: numbers of voters.
        temperature: of the vote.
        group: a gloo group, or ``None`` for the default.
    """

    def __init__(
        self, bank: Pictures, queries: Pictures, *, ks: Sequence[int], temperature: float, group: dist.ProcessGroup | None
    ) -> None:
        self._bank, self._queries, self._ks, self._temperature, self._group = bank, queries, tuple(ks), temperature, group

    def __call__(self, features: Features) -> dict[int, float]:
        """Accuracy in 0..1 for each k, the same on all ranks."""
        bank, labels = self._gathered(*_extract(self._bank, features))
        queries, answers = _extract(self._queries, features)
        local = knn_accuracy(queries, answers, bank, labels, ks=self._ks, temperature=self._temperature)
        counts = torch.tensor([[round(local[k] * len(queries)) if len(queries) else 0 for k in self._ks] + [len(queries)]])
        dist.all_reduce(counts, group=self._group)
        return {k: int(counts[0, i]) / int(counts[0, -1]) for i, k in enumerate(self._ks)}

    def _gathered(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        parts: list[tuple[Tensor, Tensor] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (features, labels), group=self._group)
        return torch.cat([p[0] for p in parts if p is not None]), torch.cat([p[1] for p in parts if p is not None])


@torch.inference_mode()
def _extract(pictures: Pictures, features: Features) -> tuple[Tensor, Tensor]:
    found, labels = [], []
    for images, classes in pictures:
        found.append(features(images).float().cpu())
        labels.append(classes.cpu())
    if not found or not sum(map(len, labels)):
        raise DataError("the evaluation shards have no labelled sample", where="evaluation.knn", mend="give shards with .cls members")
    return torch.cat(found), torch.cat(labels)


def raw_pixels(images: Tensor) -> Tensor:
    """The pictures themselves as features ``[n, 3 * h * w]``: what a representation has to beat."""
    return images.flatten(1)
