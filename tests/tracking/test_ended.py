"""A run whose ranks were killed is not left running in its tracker."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.pack import synthetic as scenes
from pipeline.runtime import job_record
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.ended import record_end
from pipeline.tracking.journal import Journal, read
from tests.helpers.limits import LONG, deadline
from tests.helpers.runs import TOY, command, processes_of, started_and_held, train, wait_for_step


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.note("start", attempt=0, ranks=2)
    journal = Journal(made.journal(0))
    journal.tags({"fovea.state": "running"})
    journal.metrics(3, {"train/loss": 1.0})
    journal.close()
    return made


def states(run: RunDirectory, attempt: int = 0) -> Iterator[str]:
    for _, row in read(run.journal(attempt)):
        if row["kind"] == "tags":
            yield row["values"]["fovea.state"]


@pytest.mark.parametrize(("code", "state"), [(137, "failed"), (1, "failed"), (130, "stopped"), (143, "stopped"), (0, "")])
def test_the_end_of_a_launch_is_added_once(run: RunDirectory, code: int, state: str) -> None:
    assert record_end(run) == "", "it may be training"
    with run.journal(0).open("a") as file:
        file.write('{"t": 1.0, "kind": "metr')  # cut off by the kill
    run.note("end", attempt=0, code=code)
    run.write("logs/attempt-0000/failure.json", {"what": "out of memory"})
    assert record_end(run) == state
    assert list(states(run)) == (["running", state] if state else ["running"])
    if state:
        assert [row["values"] for _, row in read(run.journal(0))][-1]["fovea.why"] == "out of memory"
    before = run.journal(0).read_bytes()
    assert record_end(run) == "" and run.journal(0).read_bytes() == before


def test_on_a_cluster_the_final_state_counts_and_not_the_end_of_an_attempt(run: RunDirectory) -> None:
    run.note("start", attempt=0, ranks=2, job=5)
    run.note("end", attempt=0, code=1)
    assert record_end(run) == "", "it is in the queue again"
    job_record.end(run, "failed", "4 attempts ended by crash")
    assert record_end(run) == "failed"


def test_an_attempt_that_recorded_its_end_or_is_followed_by_another_is_left_alone(run: RunDirectory) -> None:
    run.note("end", attempt=0, code=1)
    run.note("start", attempt=1, ranks=2)
    assert record_end(run) == ""
    journal = Journal(run.journal(1))
    journal.tags({"fovea.state": "running"})
    journal.tags({"fovea.state": "finished"})
    run.note("end", attempt=1, code=137)  # killed as it left
    assert record_end(run) == "" and list(states(run, 1)) == ["running", "finished"]


@pytest.mark.parametrize("cluster", [True, False])
def test_an_attempt_without_a_journal_leaves_the_state_to_the_one_before(run: RunDirectory, cluster: bool) -> None:
    run.note("end", attempt=0, code=1)
    run.note("start", attempt=1, ranks=2, **({"job": 5} if cluster else {}))
    run.note("end", attempt=1, code=1)
    if cluster:
        job_record.end(run, "failed", "no port")
    Journal(run.journal(7)).close()  # of nothing that the run noted
    assert record_end(run) == "failed" and list(states(run)) == ["running", "failed"]


def test_a_cancelled_job_that_noted_no_end_is_over_once_its_ranks_must_be_gone(run: RunDirectory) -> None:
    run.note("start", attempt=0, ranks=2, job=5)
    job_record.end(run, "stopped", "the job was cancelled (scancel)")
    assert record_end(run) == "", "the ranks may be saving"
    run.write("final_state.json", {**job_record.final_state(run), "t": time.time() - 3600})
    assert record_end(run) == "stopped"


def test_a_run_of_the_cluster_that_was_continued_here_and_ended_by_its_user_is_stopped(run: RunDirectory) -> None:
    run.write("submit/job.json", {"job": 5})
    run.note("start", attempt=1, ranks=2)
    run.note("end", attempt=1, code=137, signal=True)  # Ctrl-C three times
    assert record_end(run) == "stopped"


@pytest.mark.parametrize("link", ["journal", "folder", "pipe"])
def test_nothing_is_written_through_a_link_of_a_strangers_run(run: RunDirectory, tmp_path: Path, link: str) -> None:
    run.note("end", attempt=0, code=1)
    target = tmp_path / "elsewhere"
    if link == "folder":
        run.tracking.rename(target)
        run.tracking.symlink_to(target)
    else:
        run.journal(0).rename(target)
        if link == "pipe":
            os.mkfifo(run.journal(0))
        else:
            run.journal(0).symlink_to(target)
    file = target / "journal-0000.jsonl" if link == "folder" else target
    before = file.read_bytes()
    assert record_end(run) == "" and file.read_bytes() == before


@pytest.mark.parametrize("rows", ['{"event": "end"}', "[]", '{"event": "start"}'])
def test_damaged_records_add_nothing(run: RunDirectory, rows: str) -> None:
    with (run.path / "attempts.jsonl").open("a") as file:
        file.write(rows + "\n")
    assert record_end(run) == ""
    assert not run.journal(99).exists()


@pytest.mark.parametrize(
    "document", ["[]", '{"t": "x"}', '{"t": null}', '{"state": ["failed"], "t": 1e999}', '{"t": true, "state": "stopped"}']
)
def test_a_damaged_final_state_adds_nothing(run: RunDirectory, document: str) -> None:
    run.note("start", attempt=0, ranks=2, job=5)
    (run.path / "final_state.json").write_text(document)
    assert record_end(run) == ""


def test_a_full_disk_adds_nothing_and_the_next_call_does(run: RunDirectory) -> None:
    run.note("end", attempt=0, code=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = run.journal(0).stat().st_size
    for allowed in (size, size + 20):  # nothing of the line fits, or a part of it
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
        try:
            assert record_end(run) == ""
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert record_end(run) == "failed" and list(states(run)) == ["running", "failed"]


@pytest.mark.slow
def test_a_killed_run_is_failed_in_mlflow_and_running_and_finished_once_it_is_resumed(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    scenes.write(tmp_path / "scenes", train=40, val=8, size=32, seed=3, samples_per_shard=40)
    shards, config, directory = str(tmp_path / "scenes" / "*train-*.tar"), tmp_path / "toy.yaml", tmp_path / "run"
    config.write_text(TOY)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.search_experiments()
    settings = ("tracking.enabled=true", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "train.duration=12 steps")

    def state() -> tuple[str, str]:
        experiment = client.get_experiment_by_name("fovea")
        (one,) = client.search_runs([experiment.experiment_id])
        return one.info.status, one.data.tags.get("fovea.state", "")

    launcher = started_and_held(command(config, shards, directory, *settings), 8)
    wait_for_step(directory, 7, launcher)
    cursor, end = directory / "tracking" / "cursor.json", deadline()
    while not cursor.exists() or not json.loads(cursor.read_text())["steps"]:
        assert time.monotonic() < end, "MLflow received nothing"
        time.sleep(0.05)
    while state() != ("RUNNING", "running"):  # the tags come after the metrics
        assert time.monotonic() < end, f"it is {state()}"
        time.sleep(0.1)
    os.kill(processes_of(directory)[0], signal.SIGKILL)
    assert launcher.wait(LONG) != 0
    assert state() == ("FAILED", "failed")
    done = train(config, shards, directory, *settings)
    assert done.returncode == 0, done.stderr
    assert state() == ("FINISHED", "finished")
