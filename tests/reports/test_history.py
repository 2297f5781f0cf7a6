"""Metrics of several attempts become one curve; long journals are thinned, and only their training records."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.reports.history import read_history
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import Journal

ATTEMPT = st.tuples(st.integers(0, 12), st.lists(st.tuples(st.integers(0, 14), st.sampled_from(["a", "b", "c"])), max_size=12))


def written(folder: Path, attempts: list[tuple[int, list[tuple[int, str]]]]) -> RunDirectory:
    run = RunDirectory(folder)
    for attempt, (begin, steps) in enumerate(attempts):
        run.note("start", attempt=attempt, resumed_from=begin)
        journal = Journal(run.journal(attempt))
        for number, (step, name) in enumerate(steps):
            journal.metrics(step, {name: 100.0 * attempt + number})
        journal.close()
    return run


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ATTEMPT, min_size=1, max_size=5))
def test_an_attempt_replaces_what_comes_after_its_start_in_whatever_order_steps_were_recorded(
    tmp_path: Path, attempts: list[tuple[int, list[tuple[int, str]]]]
) -> None:
    expected: dict[str, dict[int, float]] = {}
    for attempt, (begin, steps) in enumerate(attempts):
        if attempt:
            expected = {key: {step: value for step, value in points.items() if step <= begin} for key, points in expected.items()}
        for number, (step, key) in enumerate(steps):
            expected.setdefault(key, {})[step] = 100.0 * attempt + number
    history = read_history(written(Path(tempfile.mkdtemp(dir=tmp_path)), attempts))
    assert {key: points for key, points in history.metrics.items() if points} == {k: p for k, p in expected.items() if p}
    assert history.attempts == len(attempts)


def test_of_a_long_journal_every_nth_training_record_is_read_and_every_evaluation(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.note("start", attempt=0, resumed_from=0)
    journal = Journal(run.journal(0))
    for step in range(10, 10_010, 10):
        journal.metrics(step, {"train/lr": 0.5, "train/loss": float(step), "padding/" + "x" * 2000: 0.0})
        if step % 1000 == 0:
            journal.metrics(step, {"knn/k20": step / 1e5})
    journal.tags({"fovea.state": "finished"})
    journal.close()
    every, thin = read_history(run, most=2000), read_history(run, most=100)
    assert len(every.metrics["train/loss"]) == 1000
    assert 80 <= len(thin.metrics["train/loss"]) <= 120
    assert thin.metrics["train/loss"].items() <= every.metrics["train/loss"].items()
    assert {10, 10_000} <= thin.metrics["train/loss"].keys(), "the first and the last are read"
    assert thin.metrics["knn/k20"] == every.metrics["knn/k20"] and len(thin.metrics["knn/k20"]) == 10
