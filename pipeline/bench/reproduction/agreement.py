"""Whether results agree: means of seeds with 95 % intervals (Student's t), and two means that differ by chance or not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.bench.reproduction.ledger import Entry

# 97.5 % quantiles of Student's t distribution for 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: of the values.
        half: half the interval's width; ``None`` for a single value.
    """

    mean: float
    half: float | None

    def percent(self) -> str:
        """As text, such as ``48.3 ± 1.1 %``, of fractions."""
        return f"{100 * self.mean:.1f} %" if self.half is None else f"{100 * self.mean:.1f} ± {100 * self.half:.1f} %"

    def times(self) -> str:
        """As text, such as ``1.05 ± 0.02``, of ratios."""
        return f"{self.mean:.2f}" if self.half is None else f"{self.mean:.2f} ± {self.half:.2f}"


def quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution; that of 30 degrees of freedom for more, which is slightly too large."""
    return _T[min(degrees, len(_T)) - 1]


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of one or more values."""
    mean, count = statistics.fmean(values), len(values)
    return Interval(mean, None if count < 2 else quantile(count - 1) * statistics.stdev(values) / math.sqrt(count))


def compare(new: Entry, old: Entry | None) -> str:
    """Compares a result with the record.

    Both are samples of the same distribution if their means differ by less than the 95 % quantile of Student's t with the pooled
    standard deviation: then it is ``reproduced``; otherwise ``better`` or ``worse``. ``other data`` says that the training shards
    are not those of the record, ``recorded`` that there is none, and ``undecided`` that there are too few seeds.
    """
    if old is None:
        return "recorded"
    if new.data_fingerprint != old.data_fingerprint:
        return "other data"
    a, b = new.values(), old.values()
    degrees = len(a) + len(b) - 2
    difference = statistics.fmean(a) - statistics.fmean(b)
    if degrees < 1:
        return "reproduced" if difference == 0 else "undecided"
    squares = sum(sum((x - statistics.fmean(values)) ** 2 for x in values) for values in (a, b))
    margin = quantile(degrees) * math.sqrt(squares / degrees * (1 / len(a) + 1 / len(b)))
    if abs(difference) <= margin:
        return "reproduced"
    return "better" if difference > 0 else "worse"
