"""The record of a start: what the launcher spent is handed to the first rank, which writes all of it once."""

from __future__ import annotations

import json
import os
import time
from itertools import count
from pathlib import Path

import pytest

from pipeline.runtime.interpreter import alone_environment
from pipeline.runtime.startup_phases import FILE, FIRST_STEP, VARIABLE, StartupPhases, process_begin


def test_the_first_rank_writes_the_marks_of_both_processes_once(tmp_path: Path) -> None:
    begun = process_begin() - 3
    launcher = StartupPhases("launcher", begun, clock=lambda: begun + 2, cpu=lambda: 0.7)
    launcher.mark("index")
    rank = StartupPhases.of_rank({VARIABLE: launcher.variable()})
    ticks = count(5)
    rank.folder, rank.clock, rank.cpu = tmp_path / "logs", lambda: begun + next(ticks), lambda: 0.5
    rank.mark("imports")
    assert not rank.folder.exists()
    rank.mark(FIRST_STEP)
    written = (tmp_path / "logs" / FILE).read_text()
    rank.mark("first batch")  # of the second step
    rank.mark(FIRST_STEP)
    assert (tmp_path / "logs" / FILE).read_text() == written
    marks = [(mark["process"], mark["name"], mark["seconds"], mark["cpu"]) for mark in json.loads(written)["marks"]]
    assert [*marks[:1], *marks[2:]] == [("launcher", "index", 2, 0.7), ("rank", "imports", 5, 0.5), ("rank", FIRST_STEP, 6, 0.5)]
    assert marks[1][:2] == ("rank", "process") and marks[1][2] == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"begun": 1e999, "marks": []}', '{"begun": 9e12, "marks": []}', "[" * 100_000])
def test_a_variable_that_no_launcher_wrote_is_ignored(text: str) -> None:
    phases = StartupPhases.of_rank({VARIABLE: text})
    assert phases.marks == [] and phases.begun == pytest.approx(process_begin(), abs=1)


def test_a_process_began_before_it_asks(tmp_path: Path) -> None:
    assert time.time() - 1e6 < process_begin() <= time.time()


def test_a_disk_that_takes_no_file_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    StartupPhases(folder=tmp_path / "file" / "logs").mark(FIRST_STEP)


def test_commands_within_a_start_do_not_take_its_record_for_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, VARIABLE, "{}")
    assert VARIABLE not in alone_environment()
