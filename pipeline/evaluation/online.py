"""Evaluation views of a data set, and k-NN accuracy during training; preserves the training's random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.augment.views import Normalize, ViewSpec
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import GlobalBatch
from pipeline.data.order.random import permutation
from pipeline.data.storage import Storage
from pipeline.errors import DataError
from pipeline.evaluation.knn import knn_accuracy

Features = Callable[[Tensor], Tensor]
_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class FixedList:
    """A fixed list of samples, read once in chunks; the last chunk may be shorter."""

    ids: NDArray[np.uint64]
    global_batch: int

    def rank_batch(self, step: int, world: int, rank: int) -> GlobalBatch:
        """The chunk of a step; the list has already been divided among the ranks."""
        ids = self.ids[step * self.global_batch : (step + 1) * self.global_batch]
        return GlobalBatch(ids, np.zeros(len(ids), dtype=np.int64))

    def __len__(self) -> int:
        return -(-len(self.ids) // self.global_batch)


@dataclass(frozen=True)
class Shown:
    """A batch of evaluation views.

    Attributes:
        images: ``[n, 3, size, size]``.
        labels: int64 ``[n]``, -1 for none.
        numbers: int64 ``[n]`` on the CPU, the samples' positions in the whole list of all ranks.
        ids: the samples' numbers in the data set.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor
    ids: list[int]


class Pictures:
    """This rank's share of the evaluation views of (a subset of) a labelled data set; cached when small.

    Args:
        manifest: the labelled shards.
        size: side of the view, pixels.
        centre: side of the square crop as a share of the shorter side.
        place: position of the square along the longer side, 0.5 for its middle.
        most: maximum number of samples, chosen by ``seed``; ``None`` takes all.
        batch: images per forward pass.
        rank, world: rank and world size.
        device: where views go.
        seed: of the selection.
        threads: decode threads.
        store: storage of the shards.
        normalize: mean and standard deviation, as in training.

    Attributes:
        device: where views go.
        total: samples of all ranks.
        passes: forward passes that every rank makes, including those on a blank image: an engine with sharded weights gathers
            them on all ranks.
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
        place: float = 0.5,
        seed: int = 0,
        threads: int = 1,
        store: Storage | None = None,
        normalize: Normalize | None = None,
    ) -> None:
        ids = manifest.ids()
        if most is not None and most < len(ids):
            ids = ids[np.sort(permutation(len(ids), seed, 0xE7A1)[:most])]
        self.total = len(ids)
        self._spec = ViewSpec("image", 1, size, None, centre=centre, place=place, normalize=normalize or Normalize())
        self._order = FixedList(ids[rank::world], batch)
        self.passes = -(-len(ids[::world]) // batch)
        self._reader = Reader(manifest, wants=("image", "label"), store=store)
        self.device, self._threads = device, threads
        self._keep = len(self._order.ids) * size * size * 12 <= _CACHE_BYTES
        self._rank, self._world = rank, world
        self._cached: list[Shown] | None = None

    def blank(self) -> Tensor:
        """One gray image, ``[1, 3, size, size]``."""
        return torch.zeros(1, 3, self._spec.size, self._spec.size, device=self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(images [n, 3, size, size], labels [n])``; samples without a label are skipped."""
        for shown in self.shown():
            kept = shown.labels >= 0
            yield shown.images[kept], shown.labels[kept]

    def shown(self) -> Iterator[Shown]:
        """Yield all samples of this rank's share, labelled or not."""
        if self._cached is not None:
            yield from self._cached
            return
        dataset = StepDataset(self._reader, self._order, (self._spec,), seed=0, world=1, rank=0)
        options = StreamOptions(micro_batch=self._order.global_batch, workers=0, threads=self._threads, hue="off")
        stream = BatchStream(
            dataset, device=self.device, options=options, bad_samples=BadSamples(None, budget=1.0), first=0, last=len(self._order)
        )
        seen, first = [], 0
        for _, (batch,) in stream:
            images = batch.views["image"][0]
            numbers = self._rank + self._world * torch.arange(first, first + len(images))
            first += len(images)
            one = Shown(images, batch.labels, numbers, [int(i) for i in batch.ids])
            if self._keep:
                seen.append(one)
            yield one
        if self._keep:
            self._cached = seen


class OnlineKnn:
    """k-NN accuracy of a feature function; the bank is gathered from all ranks, the queries are divided among them.

    Args:
        bank: labelled images of the feature bank.
        queries: labelled images to evaluate.
        ks: numbers of neighbours.
        temperature: of the softmax over neighbours.
        group: a gloo group, or ``None`` for the default.
    """

    def __init__(
        self, bank: Pictures, queries: Pictures, *, ks: Sequence[int], temperature: float, group: dist.ProcessGroup | None
    ) -> None:
        self._bank, self._queries, self._ks, self._temperature, self._group = bank, queries, tuple(ks), temperature, group

    def __call__(self, features: Features) -> dict[int, float]:
        """Accuracy in 0..1 for each k, the same on all ranks.

        Raises:
            DataError: on all ranks, if no sample of the bank or of the queries has a label.
        """
        parts: list[list[tuple[Tensor, Tensor]]] = [[]] * dist.get_world_size()
        dist.all_gather_object(parts, _extract(self._bank, features), group=self._group)
        bank = [batch for part in parts for batch in part]
        queries = _extract(self._queries, features)
        # A single rank may have no query; an error is raised only if there is none on any rank, and then on all ranks.
        counts = torch.zeros(len(self._ks) + 1, dtype=torch.int64)
        if bank and queries:
            answers = torch.cat([labels for _, labels in queries])
            known, voters = torch.cat([found for found, _ in bank]), torch.cat([labels for _, labels in bank])
            found = torch.cat([found for found, _ in queries])
            shares = knn_accuracy(found, answers, known, voters, ks=self._ks, temperature=self._temperature)
            counts = torch.tensor([*(round(shares[k] * len(answers)) for k in self._ks), len(answers)])
        dist.all_reduce(counts, group=self._group)
        *right, asked = counts.tolist()
        if not asked:
            raise DataError(
                "the evaluation shards have no labelled sample", where="evaluation.knn", hint="give shards with .cls members"
            )
        return {k: right[i] / asked for i, k in enumerate(self._ks)}


@torch.inference_mode()
def _extract(pictures: Pictures, features: Features) -> list[tuple[Tensor, Tensor]]:
    """Features and labels of this rank's share, batch by batch; batches without a label are skipped."""
    found, passes = [], 0
    for images, labels in pictures:
        passes += 1
        if len(labels):
            found.append((features(images).float().cpu(), labels.cpu()))
        else:
            features(pictures.blank())
    for _ in range(pictures.passes - passes):
        features(pictures.blank())
    return found


def raw_pixels(images: Tensor) -> Tensor:
    """The pixels as features ``[n, 3 * h * w]``: a baseline for learned features."""
    return images.flatten(1)
