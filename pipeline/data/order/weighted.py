"""Shuffles a data set whose samples have weights: how often each occurs in an epoch, as a pure function of the position.

The weights lie end to end on a line, in units of 1/65536. An epoch takes the samples at equally spaced points, as many as the
weights sum up to; the first point moves by the golden ratio from epoch to epoch. So a sample of weight 2.5 occurs two or three
times in an epoch, one of weight 0.1 in every tenth epoch or so, each in its proportion to within a few samples however long the
run. The points are then shuffled like the samples of a data set without weights (:mod:`pipeline.data.order.dataset`). Systematic
sampling: W. G. Madow and L. H. Madow, Annals of Mathematical Statistics 15 (1944).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index.selected import UNIT
from pipeline.data.order.dataset import Epoch, ShuffledDataset, lru_get
from pipeline.data.order.random import mix, permutation
from pipeline.errors import DataError

MAX_SAMPLES = (1 << 32) - (1 << 17)  # of an epoch: products of two such numbers have 64 bits
_SHARDS, _SHIFT, _ORIGIN = 0x5AAD, 0x5817, 0x0419  # identify the random draws
_GOLDEN = 0x9E3779B97F4A7C15  # the golden ratio's fraction times 2**64
_KEPT, _KEPT_SUMS = 512, 1 << 24  # shards whose weights are kept summed up, and sums of the largest ones


class SampleWeights(Protocol):
    """Weights of the samples of some shards, in units of 1/65536."""

    @property
    def totals(self) -> NDArray[np.int64]:
        """Sum of the weights of each shard, ``[shards]``."""
        ...

    @property
    def largest(self) -> int:
        """The largest weight."""
        ...

    def of(self, shard: int) -> NDArray[np.uint32]:
        """Returns the weights of the rows of a shard, ``[samples]``."""
        ...


class WeightedDataset(ShuffledDataset):
    """One data set with weights as endless streams.

    An epoch has as many samples as the weights sum up to, rounded down. The pass over a sample counts its occurrences, so that
    those of one epoch are augmented differently.

    Args:
        counts: accepted samples of each shard, int64 ``[shards]``.
        seed: seed of the order.
        streams: number of streams; not more than an epoch has samples.
        block_size: samples that are shuffled together inside a stream.
        weights: how often each sample occurs.
    """

    def __init__(self, counts: NDArray[np.int64], seed: int, streams: int, block_size: int, weights: SampleWeights) -> None:
        super().__init__(counts, seed, streams, block_size)
        self._weights = weights
        self._ends = np.cumsum(weights.totals)
        self._length = int(self._ends[-1])
        self.total = self._length // UNIT
        if self.total > MAX_SAMPLES:
            raise DataError(
                f"an epoch of {self.total} weighted samples is too long",
                where="data.selection",
                hint=f"Use weights that sum up to {MAX_SAMPLES} at most",
            )
        self.span = self.total // streams
        self._spacing, self._excess = divmod(self._length, max(1, self.total))
        self._most = max(1, -(-weights.largest // UNIT))
        self._sums: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._kept = max(8, min(_KEPT, _KEPT_SUMS // max(1, int(counts.max(initial=1)))))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sums": OrderedDict()}

    def _epoch(self, epoch: int) -> Epoch:
        shards = permutation(len(self.counts), self._seed, epoch, _SHARDS)
        low, high = mix(self._seed, epoch, _SHIFT)
        first, more = mix(self._seed, _ORIGIN)
        phase = ((more << 32 | first) + epoch * _GOLDEN) % (1 << 64)
        origin = phase * self._length >> 64
        ends = self._before(self._ends, origin)
        counts = np.diff(ends, prepend=0)
        return Epoch(shards, counts, np.cumsum(counts[shards]), (high << 32 | low) % self.total, origin)

    def _rows(
        self, epoch: int, now: Epoch, shards: NDArray[np.int64], turns: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | int]:
        begins = (self._ends - self._weights.totals)[shards]
        points = self._before(begins, now.origin) + turns
        offsets = self._offset(points, now.origin) - begins
        rows, starts = np.empty(len(turns), dtype=np.int64), np.empty(len(turns), dtype=np.int64)
        order = np.argsort(shards, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            sums = self._sums_of(int(shards[part[0]]))
            rows[part] = np.searchsorted(sums, offsets[part], side="right")
            starts[part] = np.where(rows[part] > 0, sums[rows[part] - 1], 0)
        return rows, epoch * self._most + points - self._before(begins + starts, now.origin)

    def _turns(self, now: Epoch, shard: int, row: int) -> range:
        sums, begin = self._sums_of(shard), int(self._ends[shard] - self._weights.totals[shard])
        low, high = begin + (int(sums[row - 1]) if row else 0), begin + int(sums[row])
        first, start, end = self._before(np.array([begin, low, high]), now.origin).tolist()
        return range(start - first, end - first)

    def _offset(self, points: NDArray[np.int64], origin: int) -> NDArray[np.int64]:
        """Returns how far along the line some points of an epoch are: ``(points * length + origin) // total``."""
        excess = (points.astype(np.uint64) * np.uint64(self._excess) + np.uint64(origin)) // np.uint64(self.total)
        return points * self._spacing + excess.astype(np.int64)

    def _before(self, offsets: NDArray[np.int64], origin: int) -> NDArray[np.int64]:
        """Returns how many points of an epoch come before some offsets."""
        guess = (offsets - origin / self.total) * (self.total / self._length)
        points = np.clip(guess.astype(np.int64) - 1, 0, self.total)
        for _ in range(4):  # the guess is exact to within rounding
            points += (points < self.total) & (self._offset(np.minimum(points, self.total - 1), origin) < offsets)
        return points

    def _sums_of(self, shard: int) -> NDArray[np.int64]:
        return lru_get(self._sums, shard, self._kept, lambda key: np.cumsum(self._weights.of(key), dtype=np.int64))
