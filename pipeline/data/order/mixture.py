"""Mixes several data sets in fixed proportions; the order of samples is a pure function of the step.

Each data set is a run of consecutive shards of one manifest and has its own order and epochs: the epoch of a sample counts the
passes over *its* data set, and in one pass each sample occurs once (except for a remainder smaller than the number of lanes).

A lane assigns its slots to the data sets like a fair queue: data set ``d`` with fraction ``w`` is due for the ``j``-th time when
``w * t + phase >= j``. Slots are assigned in the order of ``t``, in integers, so after any number of slots a data set has had its
fraction to within a sample or two, however small the fraction and however long the run. The phases of the lanes are spread
evenly, so that a rare data set is spread evenly over the global batches too. Periods of 1024 slots are then shuffled.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.order import GlobalBatch, Order, in_order, lru_get, num_streams, rank_slice
from pipeline.data.order.random import mix, permutation
from pipeline.errors import ConfigError, DataError

_SET, _PERIOD = 0x5E7, 0x9E210D  # identify the random draws
PERIOD = 1024


@dataclass(frozen=True)
class Source:
    """One data set of a mixture: a run of consecutive shards.

    Attributes:
        name: name of the data set.
        first: index of its first shard.
        shards: number of its shards.
        weight: its fraction of the samples, relative to the others'; None: proportional to ``repeat`` times its size.
        repeat: how often each of its samples occurs during one epoch of a data set with repeat 1.
    """

    name: str
    first: int
    shards: int
    weight: float | None = None
    repeat: float = 1.0


class Mixture:
    """An endless, seekable stream of global batches over several data sets; the interface of ``Order``.

    An epoch of the mixture, the unit of durations and schedules, is: with repeats, as many samples as it takes for every data
    set to be seen ``repeat`` times; with weights, as many samples as all data sets have together.

    Args:
        counts: accepted samples of each shard, over all data sets.
        sources: the data sets, in the order of their shards, without gaps. Either all have a weight or none has.
        seed: seed of the order.
        global_batch: samples per step, over all ranks.
        lanes: as for ``Order``.
        block: samples of one data set that are shuffled together inside a lane.

    Raises:
        ConfigError: sizes that do not divide, or invalid weights.
        DataError: a data set with fewer samples than lanes; the message names it.
    """

    def __init__(
        self,
        counts: Sequence[int],
        sources: Sequence[Source],
        seed: int,
        global_batch: int,
        lanes: int | None = None,
        block: int = 16384,
    ) -> None:
        self.seed, self.global_batch, self.block = seed, global_batch, block
        self.lanes = num_streams(global_batch, lanes, block)
        self.sources = tuple(sources)
        _check(self.sources, len(counts))
        self._orders = []
        for number, source in enumerate(self.sources):
            own = list(counts[source.first : source.first + source.shards])
            if sum(own) < self.lanes:
                raise DataError(
                    f"data set {source.name!r} has {sum(own)} usable samples, fewer than the {self.lanes} lanes that share it",
                    where="data.sources",
                    hint="Set data.canonical_streams to fewer (a divisor of the global batch), add shards, or leave the set out.",
                )
            low, high = mix(seed, number, _SET)
            self._orders.append(Order(own, high << 32 | low, self.lanes, self.lanes, block))
        self._each = global_batch // self.lanes
        spans = [order.samples_per_epoch // self.lanes for order in self._orders]
        shares = [
            Fraction(str(source.weight)) if source.weight is not None else Fraction(str(source.repeat)) * span
            for source, span in zip(self.sources, spans, strict=True)
        ]
        common = math.lcm(*(share.denominator for share in shares))
        self._weights = [int(share * common) for share in shares]
        self._sum = sum(self._weights)
        weighted = any(source.weight is not None for source in self.sources)
        self._span = sum(spans) if weighted else max(1, round(sum(shares)))
        self._total = sum(order.total for order in self._orders)
        self._tables: OrderedDict[tuple[int, int], tuple[NDArray[np.uint16], NDArray[np.int64]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}

    @property
    def total(self) -> int:
        """Number of samples over all data sets."""
        return self._total

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch of the mixture, see the class."""
        return self._span * self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Complete steps in one epoch of the mixture."""
        return self._span // self._each

    @property
    def shares(self) -> tuple[float, ...]:
        """Fraction of the samples from each data set; they sum to 1."""
        return tuple(weight / self._sum for weight in self._weights)

    def epoch_of(self, step: int) -> int:
        """Returns the mixture's epoch of the first sample of a step; a sample's own epoch is in the batch."""
        return step * self._each // self._span

    def check_world(self, world: int) -> None:
        """Rejects a world size that does not divide the number of lanes.

        Raises:
            ConfigError: the message lists the valid ones.
        """
        rank_slice(self.lanes, world, 0)

    def batch(self, step: int) -> GlobalBatch:
        """Returns the global batch of a step, lane by lane: ``[global_batch]``."""
        return self._of_lanes(step, range(self.lanes))

    def rank_batch(self, step: int, world: int, rank: int) -> GlobalBatch:
        """Returns one rank's contiguous part of :meth:`batch`: ``[global_batch / world]``.

        Raises:
            ConfigError: an invalid world size, or no such rank.
        """
        return self._of_lanes(step, rank_slice(self.lanes, world, rank))

    def steps_of(self, number: int, first: int, last: int) -> list[int]:
        """Returns the steps in ``[first, last)`` that contain a sample, without drawing any of them.

        Args:
            number: the sample, ``shard << 32 | row``.
            first: the first step.
            last: one past the last.

        Raises:
            DataError: there is no such sample.
        """
        shard = number >> 32
        which = next((d for d, s in enumerate(self.sources) if s.first <= shard < s.first + s.shards), None)
        if which is None:
            raise DataError(f"there is no sample {number}", where="order", hint="Use numbers of this manifest.")
        low, high = self._bounds(which, first * self._each, last * self._each)
        own = number - (self.sources[which].first << 32)
        slots = (self._slot(which, lane, position) for position, lane in self._orders[which].positions_of(own, low, high))
        return sorted(slot // self._each for slot in slots if first * self._each <= slot < last * self._each)

    def shards(self, first: int, last: int, lanes: range | None = None) -> list[int]:
        """Returns the shards that steps in ``[first, last)`` read, approximately in the order of first use.

        As for ``Order``: none is missing, but some may be listed that only adjacent steps read.
        """
        lanes = range(self.lanes) if lanes is None else lanes

        def of(which: int) -> Iterator[tuple[float, int]]:
            slots_each, start = self._sum / self._weights[which], self.sources[which].first
            for position, shard in self._orders[which].uses(*self._bounds(which, first * self._each, last * self._each), lanes):
                yield position * slots_each, start + shard

        return in_order(heapq.merge(*(of(which) for which in range(len(self.sources))))) if first < last else []

    def _of_lanes(self, step: int, lanes: range) -> GlobalBatch:
        if step < 0:
            raise ConfigError(f"step {step} is negative", where="step", hint="Steps count from 0.")
        start = step * self._each
        labels = np.empty((len(lanes), self._each), dtype=np.uint16)
        positions = np.empty((len(lanes), self._each), dtype=np.int64)
        for row, lane in enumerate(lanes):
            done = 0
            while done < self._each:
                period, slot = divmod(start + done, PERIOD)
                take = min(self._each - done, PERIOD - slot)
                table = self._table(lane, period)
                labels[row, done : done + take] = table[0][slot : slot + take]
                positions[row, done : done + take] = table[1][slot : slot + take]
                done += take
        ids, epochs = np.empty(labels.shape, dtype=np.uint64), np.empty(labels.shape, dtype=np.int64)
        for which, order in enumerate(self._orders):
            mine = labels == which
            counts = mine.sum(axis=1)
            rows = np.flatnonzero(counts)
            if not len(rows):
                continue
            starts = positions[rows, mine[rows].argmax(axis=1)]  # the positions of a data set in a lane are consecutive
            part = order.lane_samples([lanes[row] for row in rows], starts.tolist(), counts[rows].tolist())
            ids[mine] = part.ids + (np.uint64(self.sources[which].first) << np.uint64(32))
            epochs[mine] = part.epochs
        return GlobalBatch(ids.reshape(-1), epochs.reshape(-1))

    def _table(self, lane: int, period: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Returns for each slot of a period the data set, and the position in this lane of that data set's stream."""

        def draw(key: tuple[int, int]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
            before, after = self._taken(lane, period * PERIOD), self._taken(lane, (period + 1) * PERIOD)
            quotas = [high - low for low, high in zip(before, after, strict=True)]
            places = permutation(PERIOD, self.seed, *key, _PERIOD)
            labels = np.repeat(np.arange(len(quotas), dtype=np.uint16), quotas)[places]
            positions = np.empty(PERIOD, dtype=np.int64)
            for which, (start, count) in enumerate(zip(before, quotas, strict=True)):
                positions[labels == which] = np.arange(start, start + count)
            return labels, positions

        return lru_get(self._tables, (lane, period), 2 * self.lanes + 2, draw)

    def _taken(self, lane: int, slots: int) -> list[int]:
        """Returns how many of the first ``slots`` slots of a lane each data set has; they sum to ``slots``."""
        unit, phase = 2 * self.lanes * self._sum, (2 * lane + 1) * self._sum

        def due(t: int) -> list[int]:
            return [(2 * self.lanes * weight * t + phase) // unit for weight in self._weights]

        low, high = max(0, slots - len(self._weights) - 1), slots + len(self._weights) + 1
        while high - low > 1:  # the last t at which at most the requested number is due
            middle = (low + high) // 2
            low, high = (middle, high) if sum(due(middle)) <= slots else (low, middle)
        taken = due(low)
        rest = slots - sum(taken)
        for which, then in enumerate(due(low + 1)):
            if rest and then > taken[which]:
                taken[which], rest = then, rest - 1
        return taken

    def _bounds(self, which: int, first: int, last: int) -> tuple[int, int]:
        """Bounds of the positions of a data set's streams in slots ``[first, last)``, for any lane and shuffle."""
        weight, slack = self._weights[which], len(self._weights) + 1
        first, last = first // PERIOD * PERIOD, -(-last // PERIOD) * PERIOD
        return max(0, weight * (first - slack) // self._sum - 1), -(-weight * (last + slack) // self._sum) + 1

    def _slot(self, which: int, lane: int, position: int) -> int:
        """Returns the slot of a lane at which a data set's stream reaches a position."""
        near = position * self._sum // self._weights[which]
        period = max(0, (near - len(self._weights) - 1 - self._sum // self._weights[which]) // PERIOD)
        while self._taken(lane, (period + 1) * PERIOD)[which] <= position:
            period += 1
        labels, positions = self._table(lane, period)
        return period * PERIOD + int(np.flatnonzero((labels == which) & (positions == position))[0])


def _check(sources: tuple[Source, ...], shards: int) -> None:
    """Rejects sources that do not cover the shards, share a name, or mix weights with repeats."""
    where = "data.sources"
    if not sources:
        raise ConfigError("no data set is given", where=where, hint="Name at least one.")
    at = 0
    for source in sources:
        if source.first != at or source.shards < 1:
            raise ConfigError(f"shards of {source.name!r} do not follow those before", where=where, hint="Leave no gap.")
        at += source.shards
        if not 0 < (source.repeat if source.weight is None else source.weight) < math.inf:
            raise ConfigError(f"weight or repeat of {source.name!r} is not positive", where=where, hint="Leave the set out.")
    if at != shards:
        raise ConfigError(f"data sets have {at} shards, the manifest {shards}", where=where, hint="Cover every shard once.")
    if len({source.name for source in sources}) < len(sources):
        raise ConfigError("two data sets have one name", where=where, hint="Give each a name of its own.")
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError("some data sets have a weight, others not", where=where, hint="Give all a weight, or none.")
