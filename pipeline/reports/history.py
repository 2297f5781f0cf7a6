"""Metrics of a run over all its attempts, read from the journals."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.evaluation.results import current_metric
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import read


@dataclass
class History:
    """A run's metrics over all attempts, each step once.

    Attributes:
        metrics: pairs of step and value by metric name, sorted by step.
        resumes: for each step from which an attempt resumed, the reason.
        attempts: number of attempts.
    """

    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    resumes: dict[int, str] = field(default_factory=dict)
    attempts: int = 0

    def line(self, name: str, batch: int) -> list[tuple[float, float]]:
        """A metric over samples seen, for steps of ``batch`` samples."""
        return [(step * batch, value) for step, value in sorted(self.metrics.get(name, {}).items())]


def read_history(run: RunDirectory) -> History:
    """Merge the journals of a run's attempts; steps after an attempt's last checkpoint are taken from the next attempt."""
    starts = {row["attempt"]: row for row in run.attempts() if row.get("event") == "start"}
    journals = {int(path.stem.removeprefix("journal-")): path for path in sorted(run.tracking.glob("journal-*.jsonl"))}
    history = History(attempts=len(starts.keys() | journals.keys()))
    ended, reached = "", 0
    for attempt, path in journals.items():
        begin = int(starts.get(attempt, {}).get("resumed_from") or 0)
        if ended:
            _resume(
                history,
                begin,
                f"attempt {attempt - 1} {ended} at step {max(reached, begin)}, attempt {attempt} resumed from",
                reached,
            )
        ended, reached = "broke off", begin
        for _, record in read(path):
            if record["kind"] == "metrics":
                step = int(record["step"])
                reached = max(reached, step)
                for name, value in record["values"].items():
                    history.metrics.setdefault(current_metric(name), {})[step] = float(value)
            elif record["kind"] == "tags":
                ended = {"stopped": f"was stopped by {record['values'].get('fovea.stop', 'a signal')}", "finished": ""}.get(
                    record["values"].get("fovea.state"), ended
                )
    return history


def _resume(history: History, begin: int, what: str, reached: int) -> None:
    again = f"; {reached - begin} steps were repeated" if reached > begin else ""
    text = f"{what} step {begin}{again}"
    history.resumes[begin] = f"{history.resumes[begin]}; {text}" if begin in history.resumes else text
    for points in history.metrics.values():
        for step in [step for step in points if step > begin]:
            del points[step]
