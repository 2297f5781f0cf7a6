"""Evaluation views of data sets, divided among the ranks, and the data that evaluators read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.sizes import Size
from pipeline.data.augment.views import ChannelSpec, Normalize, ViewSpec
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import GlobalBatch
from pipeline.data.order.random import choose
from pipeline.data.storage import Storage
from pipeline.errors import DataError
from pipeline.evaluation.settings import KnnSettings

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
class ImageBatch:
    """A batch of evaluation views.

    Attributes:
        images: ``[n, channels, height, width]``.
        labels: int64 ``[n]``, -1 for none.
        positions: int64 ``[n]`` on the CPU, the samples' positions in the whole list of all ranks.
        ids: the samples' numbers in the data set.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    ids: list[int]


class ImageSet:
    """This rank's share of the evaluation views of (a subset of) a data set; cached when small.

    Args:
        manifest: the shards.
        size: side of the view, or height and width, pixels.
        crop_fraction: sides of the crop as a share of those of the largest one of the view's aspect ratio.
        crop_position: position of the crop along the side that it does not fill, 0.5 for the middle.
        limit: maximum number of samples, chosen by ``seed``; ``None`` takes all.
        batch_size: images per forward pass.
        rank, world_size: rank and world size.
        device: where views go.
        seed: of the selection.
        threads: decode threads.
        store: storage of the shards.
        normalize: mean and standard deviation, as in training.
        channels: channels of the images; ``None`` for 8-bit RGB.

    Attributes:
        manifest: the shards.
        device: where views go.
        total: samples of all ranks.
        passes: forward passes that every rank makes, including those on a blank image: an engine with sharded weights gathers
            them on all ranks.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        size: Size,
        limit: int | None,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        crop_fraction: float = 1.0,
        crop_position: float = 0.5,
        seed: int = 0,
        threads: int = 1,
        store: Storage | None = None,
        normalize: Normalize | None = None,
        channels: ChannelSpec | None = None,
    ) -> None:
        total = manifest.total
        ids = manifest.ids(choose(total, total if limit is None else limit, seed, 0xE7A1))
        self.manifest, self.total = manifest, len(ids)
        normalize = normalize or Normalize()
        self._spec = ViewSpec(
            "image", 1, size, None, centre=crop_fraction, position=crop_position, normalize=normalize, channels=channels
        )
        self._order = FixedList(ids[rank::world_size], batch_size)
        self.passes = -(-len(ids[::world_size]) // batch_size)
        self._store = store
        self._reader = Reader(manifest, wants=("image", "label"), store=store)
        self.device, self._threads = device, threads
        self._keep = len(self._order.ids) * math.prod(self._spec.shape) * 4 * self._spec.in_channels <= _CACHE_BYTES
        self._rank, self._world_size = rank, world_size
        self._cached: list[ImageBatch] | None = None

    def blank(self) -> Tensor:
        """One uniform image, ``[1, channels, height, width]``."""
        return torch.zeros(1, self._spec.in_channels, *self._spec.shape, device=self.device)

    def reader(self, member: Literal["caption", "segmentation"]) -> Reader:
        """A reader of another part of the same samples."""
        return Reader(self.manifest, wants=(member,), checksum=False, store=self._store)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield all samples of this rank's share, labelled or not."""
        if self._cached is not None:
            yield from self._cached
            return
        dataset = StepDataset(self._reader, self._order, (self._spec,), seed=0, world=1, rank=0)
        options = StreamOptions(micro_batch=self._order.global_batch, workers=0, threads=self._threads, hue="off")
        stream = BatchStream(
            dataset, device=self.device, options=options, bad_samples=BadSamples(None, budget=1.0), first=0, last=len(self._order)
        )
        batches, first = [], 0
        for _, (loaded,) in stream:
            images = loaded.views["image"][0]
            positions = self._rank + self._world_size * torch.arange(first, first + len(images))
            first += len(images)
            batch = ImageBatch(images, loaded.labels, positions, [int(i) for i in loaded.ids])
            if self._keep:
                batches.append(batch)
            yield batch
        if self._keep:
            self._cached = batches


@dataclass(frozen=True)
class Placement:
    """What all image sets of a rank have in common.

    Attributes:
        size: side, or height and width, of the images in pixels, where the settings do not set one.
        rank, world_size: rank and world size.
        device: where images go.
        normalize: mean and standard deviation of the images.
        channels: channels of the images; ``None`` for 8-bit RGB.
        store: storage of the shards.
        group: process group for host tensors, or ``None`` for the default.
    """

    size: Size
    rank: int
    world_size: int
    device: torch.device
    normalize: Normalize | None = None
    channels: ChannelSpec | None = None
    store: Storage | None = None
    group: dist.ProcessGroup | None = None


class EvalData:
    """Data that evaluators read. The images of ``knn`` are shared by all of them, and opened with the first one that uses them.

    Args:
        placement: common to all image sets of this rank.
        knn: settings of the feature bank and of the queries.
        bank, queries: data sets to learn from and to evaluate; ``None`` if no evaluator uses them.
        class_maps: data sets with a class for each pixel, to learn from and to evaluate.

    Attributes:
        size, group: see :class:`Placement`.
    """

    def __init__(
        self,
        placement: Placement,
        knn: KnnSettings,
        *,
        bank: Manifest | None = None,
        queries: Manifest | None = None,
        class_maps: tuple[Manifest, Manifest] | None = None,
    ) -> None:
        self._placement, self._knn = placement, knn
        self._bank, self._queries, self._class_maps = bank, queries, class_maps
        self.size, self.group = placement.size, placement.group

    def images(
        self, manifest: Manifest, *, size: Size | None, limit: int | None, batch_size: int, crop_position: float = 0.5
    ) -> ImageSet:
        """This rank's images of a data set; ``size`` in pixels, by default the network's own."""
        p = self._placement
        return ImageSet(
            manifest,
            size=size or p.size,
            limit=limit,
            batch_size=batch_size,
            crop_position=crop_position,
            rank=p.rank,
            world_size=p.world_size,
            device=p.device,
            store=p.store,
            normalize=p.normalize,
            channels=p.channels,
        )

    @cached_property
    def bank(self) -> ImageSet:
        """Labelled images to learn from.

        Raises:
            DataError: there are none.
        """
        return self.images(
            _existing(self._bank, "knn.train_shards"),
            size=self._knn.image_size,
            limit=self._knn.max_train,
            batch_size=self._knn.batch_size,
        )

    @cached_property
    def queries(self) -> ImageSet:
        """Images to evaluate.

        Raises:
            DataError: there are none.
        """
        return self.images(
            _existing(self._queries, "knn.val_shards"),
            size=self._knn.image_size,
            limit=self._knn.max_val,
            batch_size=self._knn.batch_size,
        )

    @property
    def class_maps(self) -> tuple[Manifest, Manifest]:
        """Data sets with a class for each pixel, to learn from and to evaluate.

        Raises:
            DataError: there are none.
        """
        if self._class_maps is None:
            raise _missing("segmentation.train_shards")
        return self._class_maps


def _existing(manifest: Manifest | None, key: str) -> Manifest:
    if manifest is None:
        raise _missing(key)
    return manifest


def _missing(key: str) -> DataError:
    return DataError(
        "an evaluator needs shards that are not open", where=f"evaluation.{key}", hint="Declare the need in its section"
    )


def raw_pixels(images: Tensor) -> Tensor:
    """The pixels as features ``[n, channels * h * w]``: a baseline for learned features."""
    return images.flatten(1)
