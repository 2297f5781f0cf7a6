"""What ``fovea status`` says of a run that trains, from its own records: without a Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from launch.slurm import status
from launch.slurm.training_state import cost, training_state
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import Journal


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.write("config.json", {})
    made.note("start", attempt=0, ranks=2)
    journal = Journal(made.journal(0))
    for step in (50, 100):
        values = {"train/loss": 10.0 - step / 50, "perf/images_per_second": 16.0, "perf/samples_seen": step * 32.0}
        journal.metrics(step, values)
    journal.metrics(100, {"knn/top1": 0.5})
    journal.close()
    return made


def pulse(run: RunDirectory, rank: int, **values: object) -> None:
    path = run.logs(0) / "pulse" / f"rank-{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rank": rank, "step": 100, "waiting": False, **values}))


def test_loss_speed_and_the_expected_end_come_from_the_journal(run: RunDirectory) -> None:
    state = training_state(run, 0, 300, trains=True, now=1000.0)
    assert (state.loss, state.images_per_second) == (8.0, 16.0)
    assert state.seconds_left == 200 * 32 / 16 and state.expected_end == 1400.0
    assert training_state(run, 0, 300, trains=False).expected_end is None
    assert training_state(run, 0, 0, trains=True).seconds_left is None
    assert training_state(run, -1, 300, trains=True).loss is None
    assert training_state(run, 7, 300, trains=True).loss is None


def test_a_rank_that_waits_for_data_is_named_and_one_that_waits_for_it_is_not(run: RunDirectory) -> None:
    pulse(run, 0, phase="forward and backward", seconds=54.0, waiting=True)
    pulse(run, 1, phase="data", seconds=54.0)
    pulse(run, 2, phase="data", seconds=3.0)
    state = training_state(run, 0, 300, trains=True)
    assert state.waits == ["rank 1 has been in data at step 100 for 54 s"]
    assert training_state(run, 0, 300, trains=False).waits == []


def test_errors_are_named_with_their_rank_and_node(run: RunDirectory) -> None:
    failure = {"rank": 1, "node": "n2", "step": 7, "what": "out of host memory", "code": 1, "kind": "MemoryError"}
    run.write("logs/attempt-0000/failure.json", failure)
    assert training_state(run, 1, 0, trains=False).errors == ["attempt 0, rank 1 on n2 at step 7: out of host memory"]


def test_what_a_run_has_cost_is_the_sum_over_its_attempts(run: RunDirectory) -> None:
    rows = [{"started_at": 0.0, "ended_at": 3600.0, "ranks": 8}, {"started_at": 7200.0, "ranks": 16}, {"cause": "?"}]
    assert cost(run, rows, now=9000.0).hours == 8 + 8
    assert (cost(run, rows, now=9000.0).gpus, cost(run, rows, now=9000.0).price) == (False, None)
    run.write("submit/job.json", {"profile": {"gpus_per_node": 8, "gpu_hour_price": 2.5}})
    assert cost(run, rows, now=9000.0).price == 40.0


def test_status_shows_all_of_it(run: RunDirectory) -> None:
    run.write("plan.json", {"steps": 300})
    pulse(run, 0, phase="data", seconds=54.0)
    record.exclude(run, {"n2": "its clock"})
    run.write("checkpoints/step_000000100/manifest.json", {"seconds": 5.0, "scores": {"knn/top1": 0.5}})
    text = status.table(status.status(run))
    for part in ("running", "step 100 of 300", "loss 8.0000", "16 images/s", "left, done", "process hours", "for 54 s"):
        assert part in text, text
    assert "excluded: n2: its clock (until" in text and "knn/top1 0.500" in text
    assert json.loads(status.as_json(status.status(run)))["training"]["loss"] == 8.0


def test_runs_are_listed_with_time_hours_and_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, hours, top1 in (("a", 1, 0.25), ("b", 3, 0.75), ("c", 2, None)):
        run = RunDirectory(tmp_path / name)
        run.write("config.json", {})
        start = {"event": "start", "t": 1000.0, "attempt": 0, "ranks": 2}
        rows = [start, {"event": "end", "t": 1000.0 + 3600 * hours, "attempt": 0, "code": 0}]
        (run.path / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record.end(run, "finished" if name != "c" else "failed", "as it is")
        if top1 is not None:
            run.write("outcome.json", {"stop": "FINISHED", "step": 9, "steps": 9, "scores": {"knn/top1": top1}})
    with pytest.raises(SystemExit, match="0"):
        main(["runs", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1].split()[:7] == ["a", "finished", "0/9", "1:00:00", "2.00", "-", "0.2500"]
    for words, names in (
        (["--sort", "hours"], "bca"),
        (["--sort", "score"], "bac"),
        (["--sort", "time", "--state", "finished"], "ba"),
        (["--state", "failed"], "c"),
        (["--sort", "score", "--score", "none"], "abc"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(["runs", str(tmp_path), *words])
        assert "".join(line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]) == names, words
