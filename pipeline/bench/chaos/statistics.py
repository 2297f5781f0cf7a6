"""Summaries of measured faults: costs by kind, survival with its interval, goodput under faults at a given rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from pipeline.bench.chaos.records import Row


def quantile(values: Sequence[float], share: float) -> float:
    """A quantile, 0 to 1, linear between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def at_least(successes: int, trials: int) -> float:
    """Lower end of the one-sided 95 % interval of a share (Clopper and Pearson, Biometrika 26, 1934), by bisection."""
    if successes == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        tail = sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(successes, trials + 1))
        low, high = (share, high) if tail < 0.05 else (low, share)
    return low


@dataclass(frozen=True)
class Summary:
    """Faults of one kind.

    Attributes:
        kind: its name.
        count: number of faults.
        ended, equal: how many runs came to their end; how many with the bits of the undisturbed run.
        steps: median and largest number of steps executed again.
        seconds: median and 95 % quantile of the seconds lost.
        samples: samples lost or doubled, in all.
        actions: what the user had to do, with how often; the empty text for nothing.
    """

    kind: str
    count: int
    ended: int
    equal: int
    steps: tuple[float, int]
    seconds: tuple[float, float]
    samples: int
    actions: Mapping[str, int]


def summarize(rows: Sequence[Row]) -> dict[str, Summary]:
    """Summaries by kind, in the order of the rows."""
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, []).append(row)
    return {kind: _summary(kind, own) for kind, own in by_kind.items()}


def _summary(kind: str, rows: Sequence[Row]) -> Summary:
    steps, seconds = [row.steps_lost for row in rows], [row.seconds_lost for row in rows]
    actions: dict[str, int] = {}
    for row in rows:
        actions[row.action] = actions.get(row.action, 0) + 1
    return Summary(
        kind,
        len(rows),
        sum(row.ended for row in rows),
        sum(row.equal for row in rows),
        (statistics.median(steps), max(steps)),
        (statistics.median(seconds), quantile(seconds, 0.95)),
        sum(row.samples_wrong for row in rows),
        actions,
    )


@dataclass(frozen=True)
class Goodput:
    """Share of the time that trains, with its 95 % interval."""

    mean: float
    low: float
    high: float


def goodput(rows: Sequence[Row], every: float, *, hours: float = 24.0, draws: int = 500, seed: int = 0) -> Goodput:
    """Goodput under faults at random moments, computed from measured costs.

    Each draw resamples the measured faults (bootstrap; kinds with equal weights, whatever their number of rows) and plays some
    hours in which faults arrive at exponential distances and each costs the seconds of one resampled fault.

    Args:
        rows: measured faults, without controls.
        every: mean seconds of training between two faults.
        hours: length of the play.
        draws: number of plays.
        seed: of the random numbers.
    """
    rng = Random(seed)
    by_kind: dict[str, list[float]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, []).append(row.seconds_lost)
    shares = []
    for _ in range(draws):
        costs = [rng.choices(values, k=len(values)) for values in by_kind.values()]
        clock = useful = 0.0
        while clock < hours * 3600:
            trained = rng.expovariate(1 / every)
            lost = rng.choice(rng.choice(costs))
            clock, useful = clock + trained + lost, useful + trained
        shares.append(useful / clock)
    return Goodput(statistics.mean(shares), quantile(shares, 0.025), quantile(shares, 0.975))
