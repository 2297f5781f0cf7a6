"""What a job makes of the attempts before it, and which nodes a run avoids: without a Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.slurm import excluded_nodes, job_end, takeover
from launch.slurm import slurm_commands as tools
from launch.slurm.decide import AttemptResult, Budgets, decide, spent
from launch.slurm.node_checks import clock_error
from launch.slurm.slurm_commands import Job
from pipeline.errors import LaunchError
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.write("submit/job.json", {"job": 7})
    made.note("start", attempt=0, job=7, ranks=2, before=-1)
    return made


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("TIMEOUT", "time limit"),
        ("CANCELLED", "cancelled"),
        ("PREEMPTED", "preempted"),
        ("NODE_FAIL", "node"),
        ("FAILED", "supervisor"),
        ("COMPLETED", "supervisor"),
        ("OUT_OF_MEMORY", "supervisor"),
        ("", "node"),
    ],
)
def test_an_attempt_that_was_cut_off_has_the_cause_that_slurm_knows(
    run: RunDirectory, state: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_end, "of_ended", lambda job: state if job == 7 else "")
    run.write("logs/attempt-0000/pulse/rank-0.json", {"step": 5})
    beat = float(int(record.endings(run)[0]["started_at"]) + 50)
    os.utime(run.logs(0) / "pulse" / "rank-0.json", (beat, beat))
    assert takeover.close_dangling(run)
    (row,) = record.endings(run)
    assert row["cause"] == cause and row["why"]
    assert row["ended_at"] == beat, "the time in the queue counts as the attempt's"
    assert not takeover.close_dangling(run)


def test_an_attempt_that_saved_before_its_supervisor_was_killed_says_so(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write("outcome.json", {"stop": "SIGTERM", "step": 12, "steps": 24, "attempt": 0})
    monkeypatch.setattr(job_end, "of_ended", lambda job: "FAILED")
    takeover.close_dangling(run)
    (row,) = record.endings(run)
    assert row["cause"] == "supervisor" and row["why"].endswith("saved at step 12")


def test_an_attempt_that_finished_before_its_supervisor_was_killed_is_finished(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write("outcome.json", {"stop": "FINISHED", "step": 24, "steps": 24, "attempt": 0})
    monkeypatch.setattr(job_end, "of_ended", lambda job: "FAILED")
    takeover.close_dangling(run)
    assert record.endings(run)[0]["cause"] == "finished"


def test_only_a_successor_asks_whether_the_job_before_it_was_cancelled(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_end, "of_ended", lambda job: "CANCELLED")
    assert takeover.cancelled_predecessor(run, 8) == 7
    assert takeover.cancelled_predecessor(run, 7) is None  # the job itself, requeued
    record.hand_over(run, 7)  # by its own supervisor, in favour of this job
    assert takeover.cancelled_predecessor(run, 8) is None
    record.hand_over(run, 6)
    assert takeover.cancelled_predecessor(run, 8) == 7
    run.write("submit/job.json", {"job": 8})  # resumed by a user
    assert takeover.cancelled_predecessor(run, 8) is None
    monkeypatch.setattr(job_end, "of_ended", lambda job: "FAILED")
    assert takeover.cancelled_predecessor(run, 9) is None


def test_of_two_jobs_that_begin_at_once_the_first_one_attends(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(7, "RUNNING"), Job(8, "RUNNING"), Job(9, "PENDING"), Job(5, "COMPLETING")]
    monkeypatch.setattr(tools, "jobs_of", lambda *_, **__: jobs)
    assert takeover.rival(run, 7) is None
    assert takeover.rival(run, 8) == 7
    run.write("live.json", {"job": 8})
    assert takeover.rival(run, 7) == 8


def test_a_supervisor_that_is_killed_again_and_again_ends_the_run() -> None:
    rows = [{"cause": "supervisor", "why": "its supervisor was killed", "before": at, "after": at + 1} for at in range(3)]
    assert not spent(rows, Budgets())
    assert "4 attempts ended by supervisor, 3 are allowed" in spent([*rows, rows[0]], Budgets())
    assert not spent([], Budgets())


def test_a_cancelled_job_stops_the_run_unless_it_had_finished() -> None:
    assert decide(AttemptResult(stop_reason="cancelled", code=137), [], Budgets()).action == "stop"
    saved = decide(AttemptResult(stop_reason="cancelled", outcome={"stop": "SIGTERM", "step": 9}), [], Budgets())
    assert (saved.action, saved.cause) == ("stop", "cancelled") and "saved at step 9" in saved.why
    done = {"stop": "FINISHED", "step": 24, "steps": 24}
    assert decide(AttemptResult(stop_reason="cancelled", outcome=done), [], Budgets()).action == "finish"


def test_a_full_disk_is_waited_for() -> None:
    full = AttemptResult(code=1, full="the disk of /r is full", before=6, after=6)
    assert decide(full, [], Budgets()).cause == "disk"
    rows = [{"cause": "disk", "why": "", "before": 6, "after": 6}] * 12
    assert decide(full, rows[1:], Budgets()).action == "requeue"
    assert decide(full, rows, Budgets()).action == "fail"
    nodes = {"n1": "the run has 0.0 GB free of 5 required", "n2": "the run has 0.0 GB free of 5 required"}
    lacking = AttemptResult(bad_nodes=nodes, everywhere=True, full="/r lacks space", before=6, after=6)
    assert decide(lacking, rows[:1], Budgets()).action == "requeue"
    assert decide(lacking, [], Budgets()).action == "fail"  # the first attempt: somebody is there to read it


# ---- nodes that are avoided ------------------------------------------------------------------------------------------------


def test_an_excluded_node_is_forgiven_after_a_time(run: RunDirectory) -> None:
    record.exclude(run, {"n2": "its clock"}, hours=1.0)
    until = record.excluded_until(run)["n2"]
    assert record.excluded(run, until - 1) == {"n2": "its clock"}
    assert record.excluded(run, until + 1) == {}
    assert record.forgive_nodes(run) == ["n2"] and record.excluded(run) == {}
    assert record.forgive_nodes(run) == []


def test_nodes_excluded_by_earlier_versions_expire_too(run: RunDirectory) -> None:
    run.write("excluded.json", {"n2": "its clock", "n3": 5, "n4": {"why": "x", "t": "y", "until": 1}})
    written = (run.path / "excluded.json").stat().st_mtime
    assert record.excluded(run, written + 3600) == {"n2": "its clock"}
    assert record.excluded(run, written + 25 * 3600) == {}


def test_never_so_many_nodes_are_excluded_that_too_few_are_left(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "partition_nodes", lambda partition: {"n1", "n2", "n3"})
    for node in ("n3", "n1", "elsewhere"):
        record.exclude(run, {node: "its clock"})
    assert excluded_nodes.avoid(run, {"nodes": 1}) == (["n1", "n3"], [])
    assert excluded_nodes.avoid(run, {"nodes": 2}) == (["n1"], ["n3"])  # the older one is forgiven
    assert excluded_nodes.avoid(run, {"nodes": 3}) == ([], ["n1", "n3"])

    def silent(partition: str | None) -> set[str]:
        raise LaunchError("did not answer")

    monkeypatch.setattr(tools, "partition_nodes", silent)
    assert excluded_nodes.avoid(run, {"nodes": 2})[0] == ["elsewhere", "n1", "n3"]


@pytest.mark.parametrize(
    ("node", "seconds"),
    [((101.0, 103.0), 0.0), ((100.0, 110.0), 0.0), ((161.0, 163.0), 53.0), ((40.0, 42.0), -60.0), ((99.0, 109.0), -1.0)],
)
def test_a_clock_is_compared_with_the_beginning_and_the_end_of_the_check(node: tuple[float, float], seconds: float) -> None:
    answer = {"began": node[0], "ended": node[1]}
    assert clock_error(answer, 100.0, 110.0) == seconds
    assert clock_error({}, 100.0, 110.0) == 0.0
