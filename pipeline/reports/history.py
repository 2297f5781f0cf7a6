"""Metrics of a run over all its attempts, read from the journals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.evaluation.results import current_metric
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import lines, parse

MOST = 4096  # training records that are read, of all attempts; a figure has fewer pixels
_USUAL = 2000  # bytes of a training record
_TRAINING = b'"train/lr"'


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


def read_history(run: RunDirectory, *, most: int = MOST) -> History:
    """Merge the journals of a run's attempts; steps after an attempt's last checkpoint are taken from the next attempt.

    Args:
        run: the run directory.
        most: roughly the number of training records to read: of long journals only every n-th one, the first and the last.
            Evaluations, whose metrics are not those of a training record, are read always.
    """
    starts = {row["attempt"]: row for row in run.attempts() if row.get("event") == "start"}
    journals = {int(path.stem.removeprefix("journal-")): path for path in sorted(run.tracking.glob("journal-*.jsonl"))}
    history = History(attempts=len(starts.keys() | journals.keys()))
    stride = max(sum(path.stat().st_size for path in journals.values() if path.is_file()) // (_USUAL * most), 1)
    ended, reached = "", 0
    disordered: set[str] = set()  # metrics with a step after a later one, as damaged journals have
    for attempt, path in journals.items():
        begin = int(starts.get(attempt, {}).get("resumed_from") or 0)
        if ended:
            _resume(
                history,
                begin,
                f"attempt {attempt - 1} {ended} at step {max(reached, begin)}, attempt {attempt} resumed from",
                reached,
                disordered,
            )
        ended, reached = "broke off", begin
        for record in _records(path, stride):
            if record["kind"] == "metrics":
                step = int(record["step"])
                reached = max(reached, step)
                for name, value in record["values"].items():
                    points = history.metrics.setdefault(name := current_metric(name), {})
                    if points and step < next(reversed(points)):
                        disordered.add(name)
                    points[step] = float(value)
            elif record["kind"] == "tags":
                ended = {"stopped": f"was stopped by {record['values'].get('fovea.stop', 'a signal')}", "finished": ""}.get(
                    record["values"].get("fovea.state"), ended
                )
    return history


def _resume(history: History, begin: int, what: str, reached: int, disordered: set[str]) -> None:
    again = f"; {reached - begin} steps were repeated" if reached > begin else ""
    text = f"{what} step {begin}{again}"
    history.resumes[begin] = f"{history.resumes[begin]}; {text}" if begin in history.resumes else text
    for name, points in history.metrics.items():
        if name in disordered:
            history.metrics[name] = dict(sorted((step, value) for step, value in points.items() if step <= begin))
        while points and (last := next(reversed(points))) > begin:
            del points[last]
    disordered.clear()


def _records(path: Path, stride: int) -> Iterator[dict[str, Any]]:
    """The records of a journal; of training records the first, every ``stride``-th and the last."""
    count, skipped = 0, b""
    for _, line in lines(path):
        if stride > 1 and _TRAINING in line:
            count += 1
            if count % stride != 1:
                skipped = line
                continue
            skipped = b""
        if (record := parse(line)) is not None:
            yield record
    if (record := parse(skipped) if skipped else None) is not None:
        yield record
