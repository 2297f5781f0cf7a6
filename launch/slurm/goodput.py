"""Use of a run's wall time since its submission, from its own records."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory


@dataclass(frozen=True)
class Goodput:
    """Use of the wall time since submission, in seconds.

    Attributes:
        wall: from the submission, or the first start, to the end or to now.
        advanced: steps whose result is in the newest checkpoint, or in the running attempt.
        lost: steps that had to be repeated.
        starting: from an attempt's start to its first step.
        waiting: no attempt was running (queue).
        other: evaluations, checkpoints, shutdown of attempts.
        by_cause: waiting, starting and lost seconds due to interruptions, by their cause.
    """

    wall: float = 0.0
    advanced: float = 0.0
    lost: float = 0.0
    starting: float = 0.0
    waiting: float = 0.0
    other: float = 0.0
    by_cause: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the wall time that advanced training."""
        return self.advanced / self.wall if self.wall > 0 else 0.0


def goodput(run: RunDirectory, rows: list[dict[str, Any]] | None = None) -> Goodput:
    """Compute the goodput of a run from its own records.

    Args:
        run: the run directory.
        rows: its attempts; by default as recorded.
    """
    rows = [row for row in (record.endings(run) if rows is None else rows) if "started_at" in row]
    if not rows:
        return Goodput()
    submitted = [row["t"] for row in run.attempts() if row["event"] == "submit"]
    first = min([rows[0]["started_at"], *submitted[:1]])
    end = float(rows[-1].get("ended_at", time.time()))
    waiting = starting = trained = 0.0
    causes: dict[str, float] = {}
    before, cause = first, "queue"
    for row in rows:
        gap = max(row["started_at"] - before, 0.0)
        last = row.get("ended_at", end)
        begin = row.get("training_at", last)
        waiting += gap
        starting += begin - row["started_at"]
        trained += max(last - begin, 0.0)
        causes[cause] = causes.get(cause, 0.0) + gap + (begin - row["started_at"])
        before, cause = last, str(row.get("cause", "unknown"))
    advanced, lost = _steps_seconds(run, rows)
    causes = {name: seconds for name, seconds in causes.items() if seconds > 0}
    other = max(trained - advanced - lost, 0.0)
    return Goodput(max(end - first, 0.0), min(advanced, end - first), lost, starting, waiting, other, causes)


def _steps_seconds(run: RunDirectory, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of steps that count, and of those that had to be repeated."""
    newest = max((path for path in run.checkpoints.glob("step_*")), default=None)
    kept = float(record.read(newest / "manifest.json").get("seconds", 0.0)) if newest is not None else 0.0
    done = 0.0
    for row in rows:
        last = record.read(run.logs(int(row["attempt"])) / "train_seconds.json")
        done += float(last.get("seconds", 0.0)) - float(last.get("began", 0.0))
    if done <= kept or record.final_state(run).get("state") == "finished":
        return kept, max(done - kept, 0.0)
    unsaved = record.read(run.logs(int(rows[-1]["attempt"])) / "train_seconds.json") if "ended_at" not in rows[-1] else {}
    current = max(
        float(unsaved.get("seconds", 0.0)) - kept, 0.0
    )  # steps of a running attempt since its last checkpoint are not lost
    return kept + current, max(done - kept - current, 0.0)
