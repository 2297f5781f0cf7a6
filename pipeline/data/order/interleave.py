"""Decides which data set each sample of a stream comes from, in fixed proportions; a pure function of the position.

A stream assigns its slots to the data sets like a fair queue: data set ``d`` with fraction ``w`` is due for the ``j``-th time
when ``w * t + phase >= j``. Slots are assigned in the order of ``t``, in integers, so after any number of slots a data set has
had its fraction to within a sample or two, however small the fraction and however long the run. The phases of the streams are
spread evenly, so that a rare data set is spread evenly over the global batches too. Periods of 1024 slots are then shuffled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.dataset import lru_get
from pipeline.data.order.random import permutation

_PERIOD = 0x9E210D  # identifies the random draw
PERIOD = 1024


class Interleaver:
    """Assignment of the slots of all streams to data sets. With a single data set, slots are its positions.

    Args:
        weights: relative frequency of each data set.
        streams: number of streams.
        seed: seed of the shuffling.
    """

    def __init__(self, weights: Sequence[int], streams: int, seed: int) -> None:
        self.weights, self._streams, self._seed = tuple(weights), streams, seed
        self._sum = sum(weights)
        self._tables: OrderedDict[tuple[int, int], tuple[NDArray[np.uint16], NDArray[np.int64]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}

    @property
    def fractions(self) -> tuple[float, ...]:
        """Fraction of the samples from each data set; they sum to 1."""
        return tuple(weight / self._sum for weight in self.weights)

    def slots(self, streams: Sequence[int], start: int, count: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Returns the data set of each slot, and the position in the stream of that data set: ``[streams, count]`` each.

        Args:
            streams: the streams.
            start: their first slot.
            count: number of slots.
        """
        labels = np.zeros((len(streams), count), dtype=np.uint16)
        positions = np.empty((len(streams), count), dtype=np.int64)
        if len(self.weights) == 1:
            positions[:] = np.arange(start, start + count)
            return labels, positions
        for row, stream in enumerate(streams):
            done = 0
            while done < count:
                period, slot = divmod(start + done, PERIOD)
                take = min(count - done, PERIOD - slot)
                table = self._table(stream, period)
                labels[row, done : done + take] = table[0][slot : slot + take]
                positions[row, done : done + take] = table[1][slot : slot + take]
                done += take
        return labels, positions

    def bounds(self, dataset: int, first: int, last: int) -> tuple[int, int]:
        """Bounds of the positions of a data set in slots ``[first, last)``, for any stream."""
        if len(self.weights) == 1:
            return first, last
        weight, slack = self.weights[dataset], len(self.weights) + 1
        first, last = first // PERIOD * PERIOD, -(-last // PERIOD) * PERIOD
        return max(0, weight * (first - slack) // self._sum - 1), -(-weight * (last + slack) // self._sum) + 1

    def slot_of(self, dataset: int, stream: int, position: int) -> int:
        """Returns the slot of a stream at which a data set reaches a position."""
        if len(self.weights) == 1:
            return position
        near = position * self._sum // self.weights[dataset]
        period = max(0, (near - len(self.weights) - 1 - self._sum // self.weights[dataset]) // PERIOD)
        while self.taken(stream, (period + 1) * PERIOD)[dataset] <= position:
            period += 1
        labels, positions = self._table(stream, period)
        return period * PERIOD + int(np.flatnonzero((labels == dataset) & (positions == position))[0])

    def taken(self, stream: int, slots: int) -> list[int]:
        """Returns how many of the first ``slots`` slots of a stream each data set has; they sum to ``slots``."""
        unit, phase = 2 * self._streams * self._sum, (2 * stream + 1) * self._sum

        def due(t: int) -> list[int]:
            return [(2 * self._streams * weight * t + phase) // unit for weight in self.weights]

        low, high = max(0, slots - len(self.weights) - 1), slots + len(self.weights) + 1
        while high - low > 1:  # the last t at which at most the requested number is due
            middle = (low + high) // 2
            low, high = (middle, high) if sum(due(middle)) <= slots else (low, middle)
        taken = due(low)
        rest = slots - sum(taken)
        for dataset, then in enumerate(due(low + 1)):
            if rest and then > taken[dataset]:
                taken[dataset], rest = then, rest - 1
        return taken

    def _table(self, stream: int, period: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Returns for each slot of a period the data set, and the position in this stream of that data set."""

        def draw(key: tuple[int, int]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
            before, after = self.taken(stream, period * PERIOD), self.taken(stream, (period + 1) * PERIOD)
            quotas = [high - low for low, high in zip(before, after, strict=True)]
            shuffled = permutation(PERIOD, self._seed, *key, _PERIOD)
            labels = np.repeat(np.arange(len(quotas), dtype=np.uint16), quotas)[shuffled]
            positions = np.empty(PERIOD, dtype=np.int64)
            for dataset, (start, count) in enumerate(zip(before, quotas, strict=True)):
                positions[labels == dataset] = np.arange(start, start + count)
            return labels, positions

        return lru_get(self._tables, (stream, period), 2 * self._streams + 2, draw)
