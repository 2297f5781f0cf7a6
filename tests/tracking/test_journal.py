"""The journal: whole lines on disk at once, read again from any place, whatever happened to the last one."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from itertools import count
from pathlib import Path

import pytest

from pipeline.tracking.journal import Journal, read


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    ticks = count(100)
    return Journal(tmp_path / "deep" / "journal-0000.jsonl", clock=lambda: next(ticks) + 0.12345)


def records(path: Path, offset: int = 0) -> list[dict[str, object]]:
    return [record for _, record in read(path, offset)]


def test_what_is_written_is_read_in_order_with_its_time(journal: Journal, tmp_path: Path) -> None:
    journal.metrics(7, {"train/loss": 5.25, "n": 3})
    journal.params({"schedule.lr.peak": 1e-3, "data.shards": ("a", "b"), "none": None})
    journal.tags({"fovea.attempt": 2})
    journal.artifact(tmp_path / "report.html")
    assert records(journal.path) == [
        {"t": 100.123, "kind": "metrics", "step": 7, "values": {"train/loss": 5.25, "n": 3.0}},
        {"t": 101.123, "kind": "params", "values": {"schedule.lr.peak": "0.001", "data.shards": "('a', 'b')", "none": "None"}},
        {"t": 102.123, "kind": "tags", "values": {"fovea.attempt": "2"}},
        {"t": 103.123, "kind": "artifact", "path": str(tmp_path / "report.html")},
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(journal: Journal) -> None:
    for step in range(3):
        journal.metrics(step, {"loss": float(step)})
        assert len(records(journal.path)) == step + 1


def test_numbers_that_are_none_survive_as_valid_json(journal: Journal) -> None:
    journal.metrics(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    line = journal.path.read_text()
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    (record,) = records(journal.path)
    a, b, c = (float(value) for value in record["values"].values())  # type: ignore[attr-defined]
    assert math.isnan(a)
    assert (b, c) == (math.inf, -math.inf)


def test_reading_goes_on_where_it_stopped(journal: Journal) -> None:
    journal.metrics(0, {"loss": 1.0})
    journal.metrics(1, {"loss": 2.0})
    (first, _), (second, _) = read(journal.path)
    assert [record["step"] for record in records(journal.path, first)] == [1]
    assert records(journal.path, second) == []
    journal.metrics(2, {"loss": 3.0})
    assert [record["step"] for record in records(journal.path, second)] == [2]
    assert second == len(b"".join(journal.path.read_bytes().splitlines(keepends=True)[:2]))


def test_a_torn_last_line_waits_until_it_is_whole(journal: Journal) -> None:
    journal.metrics(0, {"loss": 1.0})
    whole = journal.path.read_bytes()
    for cut in range(1, len(whole)):
        journal.path.write_bytes(whole + whole[:-cut])
        assert len(records(journal.path)) == 1
    journal.path.write_bytes(whole + whole)
    assert len(records(journal.path)) == 2


def test_a_line_that_is_no_json_hides_nothing_else(journal: Journal) -> None:
    journal.metrics(0, {"loss": 1.0})
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b'{"t": 3, "ki\xff\n' + whole)
    found = list(read(journal.path))
    assert [record["step"] for _, record in found] == [0, 0]
    assert found[-1][0] == journal.path.stat().st_size


def test_an_attempt_that_goes_on_appends(journal: Journal) -> None:
    journal.metrics(0, {"loss": 1.0})
    journal.close()
    journal.close()
    again = Journal(journal.path)
    again.metrics(1, {"loss": 1.0})
    again.sync()
    assert [record["step"] for record in records(journal.path)] == [0, 1]


def test_a_record_waits_for_no_disk_and_a_checkpoint_waits_once(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(os, "fsync", waits.append)
    for step in range(200):
        journal.metrics(step, {"loss": 0.5})
    assert not waits
    journal.sync()
    assert len(waits) == 1


def test_a_full_disk_costs_no_record_and_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal-0000.jsonl"
    journal = Journal(path, clock=lambda: 1.0)
    journal.metrics(1, {"loss": 1.0})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # within the second line, as where a disk becomes full
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        for step in range(2, 60):
            journal.metrics(step, {"loss": float(step)})
        journal.sync()
        assert [row["step"] for row in records(path)] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    journal.metrics(60, {"loss": 60.0})
    assert [row["step"] for row in records(path)] == list(range(1, 61))
    assert journal.dropped == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "cannot be written" in said[0] and "is written again" in said[1]


def test_records_that_no_memory_is_left_for_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.journal._KEPT", 200)
    (tmp_path / "tracking").write_text("a file where the folder should be")
    journal = Journal(tmp_path / "tracking" / "journal-0000.jsonl", clock=lambda: 1.0)
    for step in range(10):
        journal.metrics(step, {"loss": float(step)})
    assert 0 < journal.dropped < 10
    (tmp_path / "tracking").unlink()
    journal.close()
    assert len(records(journal.path)) == 10 - journal.dropped
    assert f"{journal.dropped} records were lost" in capsys.readouterr().err
