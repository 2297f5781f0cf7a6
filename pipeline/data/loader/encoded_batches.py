"""Stateless part of the loader, run in worker processes: maps steps to encoded samples with their augmentation plans.

A torch ``DataLoader`` iterates over step *numbers*. The content of a step is a pure function of its number, so a worker has no
state to save, a dead worker can be replaced, and resuming means starting at another number.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pipeline.data import storage
from pipeline.data.augment.curriculum import stage_at
from pipeline.data.augment.masks import block_masks, kept_patches, mask_counts
from pipeline.data.augment.plan import ViewPlan, make_plan, set_of_step
from pipeline.data.augment.views import MaskSpec, PatchDropout, TextSpec, ViewSet, ViewSpec
from pipeline.data.loader.reader import Reader, Record
from pipeline.data.loader.text import choose, tokenizer
from pipeline.data.order.order import GlobalBatch, Source
from pipeline.errors import FoveaError
from pipeline.runtime.process_pool import adopt

_MASK_STREAM = 1_000_003
_DROPOUT_STREAM = 3_000_017
_REPLACEMENTS = 3
_log = logging.getLogger(__name__)


class Ordering(Protocol):
    """Maps step numbers to samples, as a pure function."""

    @property
    def global_batch(self) -> int:
        """Samples of a step over all ranks."""
        ...

    def rank_batch(self, step: int, world: int, rank: int) -> GlobalBatch:
        """Returns one rank's part of a global batch."""
        ...


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a step, not yet decoded.

    Attributes:
        step: the step's number.
        records: the samples as stored, good and bad.
        epochs: int64 ``[n]``, the epoch each sample belongs to.
        plan: one :class:`ViewPlan` per view; rows of bad samples are drawn again once their substitute is known.
        masks: for each masked view name bool ``[count, n, patches]``.
        usage: storage counters of reading it, see :meth:`pipeline.data.storage.Storage.usage`.
        tokens: int64 ``[n, context]``, if text is requested.
        counts: samples of each data set, as ``seen/<name>``.
        kept: for each view name whose patches are dropped int64 ``[count, n, kept]``, those that are not.
    """

    step: int
    records: list[Record]
    epochs: NDArray[np.int64]
    plan: list[ViewPlan]
    masks: dict[str, NDArray[np.bool_]]
    usage: dict[str, float] = field(default_factory=dict)
    tokens: NDArray[np.int64] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    kept: dict[str, NDArray[np.int64]] = field(default_factory=dict)


class StepDataset(Dataset[RankBatch]):
    """Map-style data set from step number to :class:`RankBatch`; picklable, stateless.

    Args:
        reader: reads the bytes of samples.
        order: maps steps to samples.
        specs: the views to plan, unless ``sets`` is given.
        seed: the run's seed.
        world: number of ranks.
        rank: this rank.
        text: how to tokenize captions, if the method reads them.
        sources: the data sets, for counting; empty counts nothing.
        sets: views of several sizes, of which each step uses one set; empty means ``specs`` at every step.
        stages: the views of each stage of a curriculum, before these sets.
        ends: first step after each stage, see :func:`pipeline.data.augment.curriculum.stage_ends`.
    """

    def __init__(
        self,
        reader: Reader,
        order: Ordering,
        specs: tuple[ViewSpec, ...],
        *,
        seed: int,
        world: int,
        rank: int,
        text: TextSpec | None = None,
        sources: Sequence[Source] = (),
        sets: Sequence[ViewSet] = (),
        stages: Sequence[tuple[ViewSpec, ...]] = (),
        ends: Sequence[int] = (),
    ) -> None:
        self.reader, self.order, self.specs = reader, order, specs
        self._sets = [*((ViewSet(views),) for views in stages), tuple(sets) or (ViewSet(specs),)]
        self._stage_ends = tuple(ends)
        self.seed, self.world, self.rank = seed, world, rank
        self.text, self._names = text, [source.name for source in sources]
        self._ends = np.cumsum([source.shards for source in sources])
        if text is not None:
            tokenizer(text)  # fails here rather than in a worker

    def sets_at(self, step: int) -> tuple[ViewSet, ...]:
        """Returns the sets of views that steps of a step's stage may use; the same tuple for all steps of a stage."""
        return self._sets[stage_at(self._stage_ends, step)]

    def specs_at(self, step: int) -> tuple[ViewSpec, ...]:
        """Returns the views of a step, the same on every rank."""
        sets = self.sets_at(step)
        return sets[set_of_step(sets, step, seed=self.seed)].views

    def __getitem__(self, step: int) -> RankBatch:
        """Reads and plans one step."""
        specs = self.specs_at(step)
        batch = self.order.rank_batch(step, self.world, self.rank)
        epochs = batch.epochs.tolist()
        before = self.reader.store.usage()
        records = [self.with_caption(record, epoch) for record, epoch in zip(self.reader.fetch(batch.ids), epochs, strict=True)]
        usage = {name: value - before.get(name, 0.0) for name, value in self.reader.store.usage().items()}
        storage.forget_deleted()  # the cache may have evicted shards since the last step
        sizes = np.array([(max(r.height, 1), max(r.width, 1)) for r in records], dtype=np.int64)
        plan = make_plan(specs, ids=batch.ids, epochs=batch.epochs, sizes=sizes, seed=self.seed)
        masks = {
            spec.name: self._masks(spec, spec.mask, _MASK_STREAM + number, batch.ids, step)
            for number, spec in enumerate(specs)
            if spec.mask is not None
        }
        tokens = tokenizer(self.text)([record.caption or "" for record in records]) if self.text is not None else None
        kept = {
            spec.name: self._kept(spec, spec.dropout, _DROPOUT_STREAM + 64 * number, batch)
            for number, spec in enumerate(specs)
            if spec.dropout is not None
        }
        return RankBatch(step, records, batch.epochs, plan, masks, usage, tokens, self._counts(batch.ids), kept)

    def with_caption(self, record: Record, epoch: int) -> Record:
        """Returns the sample with the caption chosen for an epoch."""
        if len(record.captions) < 2:
            return record
        return replace(record, caption=choose(record.captions, record.id, epoch, self.seed))

    def _counts(self, ids: NDArray[np.uint64]) -> dict[str, int]:
        which = np.searchsorted(self._ends, (ids >> np.uint64(32)).astype(np.int64), side="right")
        counts = np.bincount(which, minlength=len(self._names)) if self._names else ()
        return {f"seen/{name}": int(count) for name, count in zip(self._names, counts, strict=False) if count}

    def _masks(self, spec: ViewSpec, mask: MaskSpec, stream: int, ids: NDArray[np.uint64], step: int) -> NDArray[np.bool_]:
        rows, columns = spec.grid(mask.patch)
        total = self.order.global_batch
        # Assigned over the whole global batch, so that the result does not depend on the number of ranks.
        counts = mask_counts(spec.count * total, rows * columns, mask, self.seed, stream, step).reshape(total, spec.count)
        share = total // self.world
        rank_counts = counts[self.rank * share : (self.rank + 1) * share]
        return np.stack(
            [block_masks(rank_counts[:, v], rows, columns, ids, self.seed, stream, step, v) for v in range(spec.count)]
        )

    def _kept(self, spec: ViewSpec, dropout: PatchDropout, stream: int, batch: GlobalBatch) -> NDArray[np.int64]:
        rows, columns = spec.grid(dropout.patch)
        return np.stack(
            [kept_patches(batch.ids, batch.epochs, rows * columns, dropout, self.seed, stream + v) for v in range(spec.count)]
        )


class _ErrorsAsValues(Dataset[RankBatch | FoveaError]):
    """Returns this project's errors as values: raised in a worker, the loader would wrap them in a traceback."""

    def __init__(self, dataset: StepDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, step: int) -> RankBatch | FoveaError:
        try:
            return self._dataset[step]
        except FoveaError as error:
            return error


def _quiet_worker(environment: dict[str, str], _: int) -> None:
    """Ignores signals, which the trainer handles; a worker ends with its parent, even after SIGKILL."""
    adopt(environment)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def portions(dataset: StepDataset, *, first: int, last: int | None, workers: int, prefetch: int) -> Iterator[RankBatch]:
    """Yields the rank's batches of steps ``first``, ``first + 1``, … in order.

    Args:
        dataset: the data set.
        first: the first step.
        last: one past the last step, or ``None`` for no end.
        workers: reader processes; 0 reads in the calling thread. When one dies (out of memory, killed) all are restarted at the
            next step due.
        prefetch: steps each worker reads in advance.

    Raises:
        DataError: a shard is missing or was changed.
        RuntimeError: workers die repeatedly at the same step.
    """
    step, deaths = first, 0
    while last is None or step < last:
        try:
            for portion in _read(dataset, count(step) if last is None else range(step, last), workers, prefetch):
                yield portion
                step, deaths = step + 1, 0
        except RuntimeError as error:
            deaths += 1
            if deaths > _REPLACEMENTS or "exited unexpectedly" not in str(error):
                raise
            _log.warning("a reader process died (%s); reading continues at step %d with new ones", str(error), step)


def _read(dataset: StepDataset, steps: Any, workers: int, prefetch: int) -> Iterator[RankBatch]:
    if workers == 0:
        yield from (dataset[step] for step in steps)
        return
    loader = DataLoader(
        _ErrorsAsValues(dataset),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=prefetch,
        multiprocessing_context="forkserver",
        worker_init_fn=partial(_quiet_worker, dict(os.environ)),
        collate_fn=_as_is,
        generator=torch.Generator(),  # the loader draws a seed, which must not advance the training's random numbers
    )
    try:
        for portion in loader:
            if isinstance(portion, FoveaError):
                raise portion
            yield portion
    except Exception as error:
        # The traceback's frames reference the loader, whose processes ignore SIGTERM and would live as long as the error.
        raise error.with_traceback(None) from None


def _as_is(portion: Any) -> Any:
    return portion
