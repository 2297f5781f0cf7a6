"""Distributions of integers in bounded memory: how often each value occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

MOST = 1 << 20  # distinct values; with more, values are rounded
_DIGITS = 12  # binary digits that are kept first, a relative error of 0.05 %; then 11, 10, … until few enough differ

Numbers = NDArray[np.int64]


def rounded(values: Numbers, digits: int) -> Numbers:
    """Non-negative values with their first binary digits, the rest 0."""
    shift = np.maximum(np.frexp(values.astype(np.float64))[1] - digits, 0)
    return values >> shift << shift


def pairs(first: Numbers, second: Numbers) -> Numbers:
    """Two non-negative numbers below 2³¹ as one."""
    return first << 32 | second


def rounded_pairs(values: Numbers, digits: int) -> Numbers:
    """:func:`pairs` of rounded numbers."""
    return pairs(rounded(values >> 32, digits), rounded(values & 0xFFFFFFFF, digits))


class Tally:
    """Counts values as they come.

    Args:
        rounding: applied to all values, with fewer and fewer digits, while more than ``most`` differ; ``None``: never.
        most: number of distinct values to hold.

    Attributes:
        digits: binary digits that are kept of each value; ``None``: all.
    """

    def __init__(self, rounding: Callable[[Numbers, int], Numbers] | None = rounded, most: int = MOST) -> None:
        self._rounding, self._most = rounding, most
        self._values = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._pending: list[Numbers] = []
        self._waiting = 0
        self.digits: int | None = None

    def add(self, values: NDArray[np.integer]) -> None:
        """Counts some values."""
        own = values.astype(np.int64)
        self._pending.append(own if self.digits is None or self._rounding is None else self._rounding(own, self.digits))
        self._waiting += len(own)
        if self._waiting >= self._most:
            self._merge()

    def result(self) -> tuple[Numbers, Numbers]:
        """The distinct values, ascending, and how often each occurs."""
        self._merge()
        return self._values, self._counts

    def _merge(self) -> None:
        if not self._pending:
            return
        values, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending, self._waiting = [], 0
        self._set(np.concatenate([self._values, values]), np.concatenate([self._counts, counts]))
        while len(self._values) > self._most and self._rounding is not None and self.digits != 1:
            self.digits = _DIGITS if self.digits is None else self.digits - 1
            self._set(self._rounding(self._values, self.digits), self._counts)

    def _set(self, values: Numbers, counts: Numbers) -> None:
        self._values, where = np.unique(values, return_inverse=True)
        self._counts = np.zeros(len(self._values), np.int64)
        np.add.at(self._counts, where, counts)


def percentiles(values: NDArray[np.float64], counts: Numbers, shares: Sequence[float]) -> list[float]:
    """Percentiles of values that occur several times; of two equally near values the one of even rank, like numpy's ``nearest``.

    Args:
        values: in any order.
        counts: how often each occurs.
        shares: in percent.
    """
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(counts[order])
    ranks = np.rint(np.asarray(shares, np.float64) / 100 * (ends[-1] - 1))
    return [float(value) for value in values[order][np.searchsorted(ends, ranks, side="right")]]
