"""The run directory: attempts are counted and small records replaced whole."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.runtime.run_directory import RunDirectory


def test_attempts_are_counted_by_their_starts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert (run.next_attempt(), run.attempts()) == (0, [])
    run.note("start", attempt=0, ranks=2)
    run.note("end", attempt=0, code=1)
    run.note("start", attempt=1, ranks=2)
    assert run.next_attempt() == 2
    assert [(row["event"], row["attempt"]) for row in run.attempts()] == [("start", 0), ("end", 0), ("start", 1)]
    assert all(row["t"] > 1.7e9 for row in run.attempts())


def test_a_torn_line_hides_no_other(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.note("start", attempt=0)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "start", "facts": {}\n')
    run.note("start", attempt=1)
    assert [row["attempt"] for row in run.attempts()] == [0, 1]


def test_a_record_is_replaced_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "deep" / "run")
    run.write("outcome.json", {"step": 1})
    run.write("outcome.json", {"step": 2})
    assert json.loads((run.path / "outcome.json").read_text()) == {"step": 2}
    assert [path.name for path in run.path.iterdir()] == ["outcome.json"]


def test_every_attempt_and_rank_writes_files_of_its_own(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    places = [run.journal(0), run.journal(1), run.bad_samples(0), run.bad_samples(1), run.logs(0), run.logs(1)]
    places += [run.batches(attempt, rank) for attempt in (0, 1) for rank in (0, 1)]
    assert len(set(places)) == len(places)
    assert all(place.is_relative_to(tmp_path) for place in places)
