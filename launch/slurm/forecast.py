"""When a run will be done: its remaining steps, its time limits, and how long it has waited in the queue so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Pauses:
    """How long a return to the queue has taken so far, means in seconds.

    Attributes:
        queue: from the end of an attempt to the start of the next; before the second attempt, from the submission to the start.
        start: from an attempt's start to its first step.
    """

    queue: float = 0.0
    start: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """The rest of a run.

    Attributes:
        end: seconds since 1970.
        attempts: further attempts that the time limit makes necessary.
        busy: seconds for which the nodes are occupied until then.
    """

    end: float
    attempts: int
    busy: float


def pauses(rows: Sequence[Mapping[str, Any]], submitted: float | None) -> Pauses:
    """Read the pauses from a run's attempts.

    Args:
        rows: attempts, as :func:`pipeline.runtime.job_record.endings` returns them.
        submitted: when the run was submitted, seconds since 1970.
    """
    started = [row for row in rows if "started_at" in row]
    gaps = [
        max(float(row["started_at"]) - float(before["ended_at"]), 0.0)
        for before, row in pairwise(started)
        if "ended_at" in before
    ]
    if not gaps and started and submitted is not None:
        gaps = [max(float(started[0]["started_at"]) - submitted, 0.0)]
    starts = [max(float(row["training_at"]) - float(row["started_at"]), 0.0) for row in started if "training_at" in row]
    return Pauses(_mean(gaps), _mean(starts))


def forecast(now: float, left: float, limit_left: float | None, attempt: float | None, history: Pauses) -> Forecast:
    """When the run is done if nothing but its time limit interrupts it.

    Args:
        now: seconds since 1970.
        left: seconds that the remaining steps take.
        limit_left: seconds for which the running attempt may still train; ``None`` for no limit.
        attempt: seconds for which a further attempt may run, until it saves before its limit.
        history: pauses so far.
    """
    rest = 0.0 if limit_left is None else left - max(limit_left, 0.0)
    if rest <= 0 or attempt is None:
        return Forecast(now + left, 0, left)
    useful = max(attempt - history.start, 1.0)
    further = math.ceil(rest / useful)
    return Forecast(now + left + further * (history.queue + history.start), further, left + further * history.start)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
