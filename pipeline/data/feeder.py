"""Steps in, encoded samples with their plans out: the stateless half of the loader, in worker processes.

A torch ``DataLoader`` runs over step *numbers*. What a step holds is a pure function of its number, so a worker has nothing to save,
a dead one can be replaced, and resuming means starting the count elsewhere.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pipeline.data.masks import block_masks, mask_counts
from pipeline.data.order import GlobalBatch
from pipeline.data.plan import ViewPlan, make_plan
from pipeline.data.reader import Reader, Record
from pipeline.data.views import ViewSpec

_MASK_STREAM = 1_000_003


class Ordering(Protocol):
    """Which samples a step holds, as a pure function of its number."""

    @property
    def global_batch(self) -> int:
        """Samples of a step over all ranks."""
        ...

    def rank_batch(self, step: int, world: int, rank: int) -> GlobalBatch:
        """One rank's share of a global batch."""
        ...


@dataclass(frozen=True)
class Portion:
    """One rank's share of a step, not yet decoded.

    Attributes:
        step: the step's number.
        records: the samples as stored, good and bad.
        epochs: int64 ``[n]``, the epoch each sample belongs to.
        plan: one :class:`ViewPlan` a view; rows of bad samples are made again once their substitute is known.
        masks: for each masked view name bool ``[count, n, patches]``.
    """

    step: int
    records: list[Record]
    epochs: NDArray[np.int64]
    plan: list[ViewPlan]
    masks: dict[str, NDArray[np.bool_]]


class Portions(Dataset[Portion]):
    """Map-style data set from step number to :class:`Portion`; picklable, stateless.

    Args:
        reader: where the bytes come from.
        order: which samples a step holds.
        specs: the views to plan.
        seed: the run's seed.
        world: number of ranks.
        rank: this rank.
    """

    def __init__(self, reader: Reader, order: Ordering, specs: tuple[ViewSpec, ...], *, seed: int, world: int, rank: int) -> None:
        self.reader, self.order, self.specs = reader, order, specs
        self.seed, self.world, self.rank = seed, world, rank

    def __getitem__(self, step: int) -> Portion:
        """Read and plan one step."""
        batch = self.order.rank_batch(step, self.world, self.rank)
        records = self.reader.fetch(batch.ids)
        sizes = np.array([(max(r.height, 1), max(r.width, 1)) for r in records], dtype=np.int64)
        plan = make_plan(self.specs, ids=batch.ids, epochs=batch.epochs, sizes=sizes, seed=self.seed)
        masks = {spec.name: self._masks(spec, batch.ids, step) for spec in self.specs if spec.mask is not None}
        return Portion(step, records, batch.epochs, plan, masks)

    def _masks(self, spec: ViewSpec, ids: NDArray[np.uint64], step: int) -> NDArray[np.bool_]:
        if spec.mask is None:
            raise ValueError(f"view {spec.name} has no masks")
        side = spec.size // spec.mask.patch
        total = self.order.global_batch
        # Dealt over the whole global batch, so that another number of ranks deals the same.
        counts = mask_counts(spec.count * total, side * side, spec.mask, self.seed, _MASK_STREAM, step).reshape(total, spec.count)
        share = total // self.world
        mine = counts[self.rank * share : (self.rank + 1) * share]
        return np.stack([block_masks(mine[:, v], side, side, ids, self.seed, _MASK_STREAM, step, v) for v in range(spec.count)])


def _quiet_worker(_: int) -> None:
    """Signals are the trainer's business; a worker ends with its parent, even one killed with -9."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def portions(dataset: Portions, *, first: int, last: int | None, workers: int, prefetch: int) -> Iterator[Portion]:
    """Portions of steps ``first``, ``first + 1``, … in order.

    Args:
        dataset: what to read.
        first: the first step.
        last: one past the last step, or ``None`` for no end.
        workers: reader processes; 0 reads in the calling thread.
        prefetch: steps each worker reads ahead.
    """
    steps: Any = count(first) if last is None else range(first, last)
    if workers == 0:
        return (dataset[step] for step in steps)
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=prefetch,
            multiprocessing_context="forkserver",
            worker_init_fn=_quiet_worker,
            collate_fn=_as_is,
        )
    )


def _as_is(portion: Portion) -> Portion:
    return portion
