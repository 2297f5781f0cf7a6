"""The run directory: attempts are counted and small records replaced whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from launch.cli.main import main
from pipeline.config.load import load
from pipeline.errors import ConfigError
from pipeline.runtime import job_record
from pipeline.runtime.clock import clock
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


def test_a_folder_for_results_is_the_runs_own(tmp_path: Path) -> None:
    run, elsewhere = RunDirectory(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run.own_folder("export", "onnx").is_dir()
    (run.path / "tracking").symlink_to(elsewhere)
    (run.path / "evaluations").write_text("")
    for names in (("tracking",), ("tracking", "eval-1"), ("evaluations",)):
        with pytest.raises(ConfigError, match="must be a folder of the run itself"):
            run.own_folder(*names)
    assert not list(elsewhere.iterdir())


def test_mlflow_sync_does_not_write_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path / "run")
    run.write_settings(load("dinov2/cifar10_vit_tiny").config)
    (tmp_path / "elsewhere").mkdir()
    (run.path / "tracking").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as ended:
        main(["mlflow", "sync", str(run.path)])
    assert ended.value.code == 2 and "must be a folder of the run itself" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "elsewhere").iterdir())


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


@pytest.mark.parametrize(
    "row",
    [
        '{"event": "start", "attempt": ["a"], "t": 1}',
        '{"event": "start", "attempt": 1e400, "t": 1}',
        '{"event": "start", "attempt": -1, "t": 1}',
        '{"event": "start", "attempt": 0, "resumed_from": "x", "t": 1}',
        '{"event": "start", "attempt": 0, "t": 1e400}',
        '{"event": "start", "attempt": 0, "t": NaN}',
        '{"event": "start", "attempt": 0, "t": "x"}',
        '{"event": "start", "attempt": 0, "t": 1, "why": ' + "[" * 200 + "]" * 200 + "}",
    ],
)
def test_attempts_with_values_of_a_wrong_type_are_skipped(tmp_path: Path, row: str) -> None:
    (tmp_path / "attempts.jsonl").write_text(f'{row}\n{{"event": "start", "attempt": 4, "t": 5.5}}\n')
    assert [line["attempt"] for line in RunDirectory(tmp_path).attempts()] == [4]


def test_a_start_and_a_step_are_read_only_from_where_they_are_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "attempts.jsonl").write_text('{"event": "start", "attempt": 0, "t": 1, "started_at": "x", "ended_at": NaN}\n')
    assert job_record.endings(run) == [{"attempt": 0, "started_at": 1}]
    for name in ("step_\u00b2", "step_7"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "manifest.json").touch()
    assert job_record.saved_step(run) == 7


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf])
def test_a_duration_that_is_not_finite_has_no_digits(seconds: float) -> None:
    assert clock(seconds) == "?"
