"""Loader of augmented views on the device, for any method: the order of a run, DALI's crops, resumable at any batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.data.augment.curriculum import stage_ends
from pipeline.data.augment.dali import Hue
from pipeline.data.augment.views import Batch, TextSpec, ViewSpec, ViewStage
from pipeline.data.library import Units, integer
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.resumable import ResumableLoader
from pipeline.data.shard_dataset import ShardDataset
from pipeline.errors import ConfigError


class ViewLoader(ResumableLoader):
    """Batches of views of the samples of WebDataset shards, as ``fovea train`` gives them to a method.

    One ``for`` loop yields the rest of the current epoch; after a ``break`` the next loop continues with the next batch. Decoding
    and augmentation run on the device (DALI, nvImageCodec); the crops, colours and masks of a sample depend on the seed, its
    number and its epoch alone.

    Args:
        shards: as for :class:`pipeline.data.ShardDataset`, which also documents the arguments that are not listed here.
        views: the views of each sample, by name.
        curriculum: the views before these, stage by stage, with the same names and counts but other sizes.
        text: how to tokenize captions; ``None`` for no tokens.
        device: where batches go; a GPU if there is one.
        num_workers: processes that read.
        threads: threads that decode and augment.
        prefetch: steps prepared ahead.
        hue: colour space of the hue shift.

    Example:
        >>> from pipeline.data import Augment, ViewLoader, ViewSpec
        >>> views = [
        ...     ViewSpec("global", count=2, size=32, crop_scale=(0.32, 1.0), augment=(Augment(gray_probability=0.2),)),
        ...     ViewSpec("local", count=4, size=16, crop_scale=(0.05, 0.32)),
        ... ]
        >>> loader = ViewLoader(SHARDS, views=views, global_batch_size=4, seed=1, device="cpu", num_workers=0)
        >>> batch = next(iter(loader))
        >>> batch.views["local"][0].shape, len(batch.views["local"]), batch.labels.shape
        (torch.Size([4, 3, 16, 16]), 4, torch.Size([4]))
        >>> loader.state_dict()["samples"]
        4
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str] = (),
        *,
        views: Sequence[ViewSpec],
        curriculum: Sequence[ViewStage] = (),
        global_batch_size: int,
        seed: int = 0,
        batch_size: int | None = None,
        text: TextSpec | None = None,
        device: str | torch.device | None = None,
        num_workers: int = 1,
        threads: int = 2,
        prefetch: int = 2,
        hue: Hue = "hsv",
        sources: Sequence[Any] | None = None,
        require: Iterable[str] = (),
        rank: int | None = None,
        world_size: int | None = None,
        bad_samples: str | Path | None = None,
        **options: Any,
    ) -> None:
        if not views:
            raise ConfigError("there are no views", where="ViewLoader", hint="Give at least one ViewSpec")
        self.dataset = ShardDataset(
            shards,
            global_batch_size=global_batch_size,
            seed=seed,
            batch_size=batch_size,
            sources=sources,
            require=require,
            rank=rank,
            world_size=world_size,
            bad_samples=bad_samples,
            **options,
        )
        channels = self.dataset.source.settings.channels
        self.views, self.text = tuple(view.of_channels(channels) for view in views), text
        self._stages = [tuple(view.of_channels(channels) for view in stage.views) for stage in curriculum]
        names = [(view.name, view.count) for view in self.views]
        if any([(view.name, view.count) for view in stage] != names for stage in self._stages):
            raise ConfigError(
                "a stage has other views than the end", where="ViewLoader.curriculum", hint="Change the sizes of views only"
            )
        self._lengths = [stage.until for stage in curriculum]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._workers, self._threads = integer("num_workers", num_workers), integer("threads", threads, 1)
        self._prefetch, self._hue = integer("prefetch", prefetch), hue

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches to the end of the epoch.

        Raises:
            DataError: a shard is missing or has changed.
            TrainingError: more than ``max_bad_fraction`` of the samples could not be used.
        """
        source, ranks, units = self.dataset.source, self.dataset.ranks, self._units()
        unit = self.dataset.next_unit(units)
        first, skipped = divmod(unit, units.per_step)
        reader = Reader(
            source.manifest,
            wants=("image", "label", "caption"),
            checksum=source.settings.verify_checksums,
            store=source.reader.store,
        )
        steps = StepDataset(
            reader,
            source.order,
            self.views,
            seed=source.order.seed,
            world=ranks.world,
            rank=ranks.rank,
            text=self.text,
            sources=source.sources,
            stages=self._stages,
            ends=stage_ends(
                self._lengths,
                epoch_samples=source.order.samples_per_epoch,
                global_batch=source.order.global_batch,
                where="ViewLoader.curriculum",
            ),
        )
        prefetcher = self.dataset.prefetcher(ranks)
        stream = BatchStream(
            steps,
            device=self.device,
            options=StreamOptions(
                micro_batch=units.batch, workers=self._workers, threads=self._threads, prefetch=self._prefetch, hue=self._hue
            ),
            bad_samples=self.dataset.account(ranks.rank, 0),
            first=first,
            last=source.order.next_epoch(first),
            prefetcher=prefetcher,
        )
        return self._batches(stream, units, unit, skipped)

    def _batches(self, stream: BatchStream, units: Units, unit: int, skipped: int) -> Iterator[Batch]:
        try:
            for _, batches in stream:
                for batch in batches[skipped:]:
                    unit += 1
                    self.dataset.advance(units, unit)
                    yield batch
                skipped = 0
        finally:
            stream.close()
