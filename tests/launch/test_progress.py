"""What a person sees of a run: lines that fit, times that can be read, silence from all ranks but one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.progress import LineLogger, LiveLineLogger, MessageLogger, progress_logger
from pipeline.runtime.clock import clock


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (-3, "0:00"), (59.9, "0:59"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_times_are_read_at_a_glance(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_line_tells_step_loss_rate_scores_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LineLogger(global_batch=64)
    lines.step(10, 110, 5.25, 640.0, {"knn/k10": 0.4321, "baseline/pixels/knn/k10": 0.3}, 10)
    lines.step(20, 110, 5.25, 640.0, {"knn/k10": 0.4321, "baseline/pixels/knn/k10": 0.3}, 10)
    line, later = capsys.readouterr().out.splitlines()
    assert line == "step     10/110  loss   5.2500     640 img/s  knn/k10 0.432  left 0:10"
    assert later == "step     20/110  loss   5.2500     640 img/s  knn/k10 0.432 (of step 10)  left 0:09"


def test_the_time_left_does_not_jump_with_one_slow_step(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LineLogger(global_batch=64)
    for rate in (640.0, 640.0, 64.0):
        lines.step(10, 110, 5.25, rate, {}, -1)
    assert capsys.readouterr().out.splitlines()[-1].endswith("left 0:12")
    lines.step(0, 10, 1.0, 0.0, {}, -1)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_live_line_never_wraps_and_messages_stand_above_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    live = LiveLineLogger(global_batch=64)
    live.step(50, 100, 5.25, 640.0, {"knn/k10": 0.4321, "knn/k20": 0.4567}, 100)
    live.log("checkpoint written")
    live.step(100, 100, 5.25, 640.0, {"knn/k10": 0.4321, "knn/k20": 0.4567}, 100)
    written = capsys.readouterr().out
    assert re.sub(r"\r\x1b\[2K", "", written).count("\n") == 2
    half, said, whole = re.split(r"\r\x1b\[2K", written)[1:]
    assert said == "checkpoint written\n"
    assert whole.endswith("\n")
    for line in (half, whole.rstrip()):
        assert "step" in line
        assert len(line) < columns
    if columns == 200:
        assert (half.count("━"), half.count("╌"), whole.count("━"), whole.count("╌")) == (12, 12, 24, 0)


def test_only_the_first_rank_shows_steps(capsys: pytest.CaptureFixture[str]) -> None:
    other, first = progress_logger(1, 64), progress_logger(0, 64)
    assert isinstance(other, MessageLogger)
    assert isinstance(first, LineLogger)
    assert not isinstance(first, LiveLineLogger), "the output of a test is no terminal"
    other.step(1, 2, 3.0, 4.0, {}, -1)
    assert capsys.readouterr().out == ""
    other.log("step 3: dino not finite")
    assert capsys.readouterr().out == "step 3: dino not finite\n"


def test_what_is_shown_is_kept_in_a_file_and_a_disk_that_takes_nothing_is_no_fault(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for place in (tmp_path / "logs" / "rank-0.log", tmp_path / "logs" / "rank-0.log" / "no-folder"):
        kept = progress_logger(0, 64, place)
        kept.log("starting")
        kept.step(10, 110, 5.25, 640.0, {}, -1)
        assert len(capsys.readouterr().out.splitlines()) == 2
    lines = (tmp_path / "logs" / "rank-0.log").read_text().splitlines()
    assert lines[0] == "starting" and lines[1].startswith("step     10/110")
    (tmp_path / "full.log").symlink_to("/dev/full")
    kept = progress_logger(0, 64, tmp_path / "full.log")
    for _ in range(2000):  # more than a buffer holds
        kept.log("the disk is full")
    assert capsys.readouterr().out.count("the disk is full") == 2000
