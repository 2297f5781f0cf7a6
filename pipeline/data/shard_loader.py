"""Loader of batches that knows how many it has handed out: resumable with workers, on any number of ranks and workers."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from pipeline.data.library import integer
from pipeline.data.loader.bad_samples import Event
from pipeline.data.resumable import ResumableLoader
from pipeline.errors import FoveaError

if TYPE_CHECKING:
    from pipeline.data.library import Ranks, Units
    from pipeline.data.shard_dataset import ShardDataset


class ShardLoader(ResumableLoader):
    """Batches of a :class:`pipeline.data.ShardDataset`, made in worker processes, in order.

    One ``for`` loop yields the rest of the current epoch; after a ``break`` the next loop continues with the next batch. The
    state counts batches that were handed out, not those that workers have prepared. Not a ``DataLoader``: Accelerate and
    Lightning leave it as it is, as they must, since each rank reads its own samples already.

    Args:
        dataset: the samples. It has the position: loops of the loader and of the data set continue each other.
        num_workers: processes that read, decode, transform and collate; 0 for none.
        collate_fn: makes a batch of a list of samples; by default that of torch, which stacks tensors of equal shape.
        prefetch_factor: batches that each worker prepares ahead.
        pin_memory: whether batches are copied to pinned memory.
        multiprocessing_context: how workers are started; by default as torch does, but never forked for object storage.

    Example:
        >>> from pipeline.data import ShardDataset
        >>> loader = ShardDataset(SHARDS, global_batch_size=4, seed=1).loader(collate_fn=list)
        >>> batch = next(iter(loader))
        >>> len(batch), loader.step, loader.state_dict()["samples"]
        (4, 1, 4)
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        multiprocessing_context: str | None = None,
    ) -> None:
        self.dataset = dataset
        num_workers = integer("num_workers", num_workers)
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.collate_fn = collate_fn or default_collate
        self._context = multiprocessing_context

    @property
    def batch_size(self) -> int:
        """Samples of a batch on this rank."""
        return self.dataset.batch_size

    def __iter__(self) -> Iterator[Any]:
        """Yields batches to the end of the epoch.

        Raises:
            DataError: a shard is missing or has changed, or the position lies within a batch.
            TrainingError: more than ``max_bad_fraction`` of the samples could not be used.
        """
        ranks, units = self.dataset.ranks, self._units()
        unit = self.dataset.next_unit(units)
        return self._batches(ranks, units, unit, self.dataset.end_of_loop(units.position(unit)))

    def _batches(self, ranks: Ranks, units: Units, unit: int, end: int) -> Iterator[Any]:
        dataset = self.dataset
        bad = dataset.account(ranks.rank, 0)
        prefetcher = dataset.prefetcher(ranks)
        if prefetcher is not None:
            prefetcher.start(unit // units.per_step)
        last = end // units.position(1)
        batches = iter(self._loader(_Batches(dataset, ranks, units, self.collate_fn), range(unit, last)))
        try:
            for batch in batches:
                if isinstance(batch, FoveaError):
                    raise batch
                collated, events = batch
                bad.saw(units.batch, events)
                if prefetcher is not None:
                    prefetcher.advance(unit // units.per_step)
                unit += 1
                dataset.advance(units, unit)
                yield collated
        finally:
            del batches  # ends the workers
            if prefetcher is not None:
                prefetcher.close()

    def _loader(self, batches: _Batches, units: range) -> DataLoader[Any]:
        remote = self.dataset.source.manifest.shards.may_be_remote
        context = self._context or ("forkserver" if remote and multiprocessing.get_start_method() == "fork" else None)
        return DataLoader(
            batches,
            batch_size=None,
            sampler=units,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            multiprocessing_context=context if self.num_workers else None,
            pin_memory=self.pin_memory,
            collate_fn=_as_is,
            generator=torch.Generator(),  # the loader draws a seed, which must not advance the random numbers of training
        )


class _Batches(Dataset[Any]):
    """Maps the number of a unit to its batch and its bad samples; returns errors, which the DataLoader would wrap."""

    def __init__(self, dataset: ShardDataset, ranks: Ranks, units: Units, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._ranks, self._units, self._collate = dataset, ranks, units, collate

    def __getitem__(self, unit: int) -> tuple[Any, list[Event]] | FoveaError:
        step, part = divmod(unit, self._units.per_step)
        rows = slice(part * self._units.batch, (part + 1) * self._units.batch)
        try:
            samples, events = self._dataset.source.samples(step, self._ranks.world, self._ranks.rank, rows)
        except FoveaError as error:
            return error
        return self._collate([self._dataset.transformed(sample) for sample in samples]), events


def _as_is(batch: Any) -> Any:
    return batch
