"""Interrupted runs on a Slurm with its own KillWait (30 s) and cred_expire (120 s): what the queue shows, and who must act."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.slurm import slurm_commands as tools
from launch.slurm import status
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.cluster_runs import (
    Start,
    causes,
    fovea,
    queue,
    ranks_of,
    reach,
    start_now,
    starter,
    supervisor_of,
    until,
    verdict,
)
from tests.helpers.slurm import NEEDS_SLURM, PREEMPTION, Cluster, cluster, preempting

pytestmark = NEEDS_SLURM


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm") / "c", extra=PREEMPTION, partitions=preempting(), defaults=True) as made:
        assert "KillWait                = 30 sec" in made.call("scontrol", "show", "config")
        yield made


@pytest.fixture
def start(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    return starter(slurm, tmp_path, monkeypatch)


def successor(run: RunDirectory, job: int) -> int:
    """The one job that waits for another."""
    (other,) = [number for number, _ in queue(run) if number != job]
    return other


def wait_for_successor(run: RunDirectory, job: int) -> int:
    until(lambda: len(queue(run)) == 2, "no successor was submitted")
    return successor(run, job)


def moment(job: int, name: str) -> float:
    return time.mktime(time.strptime(tools.facts(job)[name], "%Y-%m-%dT%H:%M:%S"))


def test_a_successor_waits_without_an_allocation_and_leaves_with_the_run(start: Start) -> None:
    run, job = start(steps=60)
    reach(run, 2)
    after = wait_for_successor(run, job)
    facts = tools.facts(after)
    assert (facts["JobState"], facts["Reason"]) == ("PENDING", "Dependency")
    assert facts["Dependency"] == f"afterany:{job}(unfulfilled)"
    assert verdict(run)["state"] == "finished"
    until(lambda: not queue(run), "a job of a finished run is left in the queue")
    assert causes(run) == ["finished"]


def test_a_run_that_saved_before_its_limit_is_eligible_again_at_once(slurm: Cluster, start: Start) -> None:
    run, job = start(steps=5000, time="2", checkpoint_lead_time=70)
    reach(run, 1, attempt=1)
    other = int(record.endings(run)[1]["job"])
    assert slurm.state(job) == "COMPLETED" and causes(run)[0] == "time limit"
    assert moment(other, "EligibleTime") - moment(job, "EndTime") < 60, "Slurm's two minutes were waited for"
    record.request(run, record.STOP, "enough")
    assert verdict(run)["state"] == "stopped"
    until(lambda: not queue(run), "a job of a stopped run is left in the queue")


def test_scancel_ends_the_run(slurm: Cluster, start: Start) -> None:
    run, job = start(steps=5000)
    reach(run, 6)
    after = wait_for_successor(run, job)
    slurm.call("scancel", str(job))
    found = verdict(run)
    until(lambda: not queue(run), "a job of a cancelled run is left in the queue")
    assert found["state"] == "stopped" and "cancelled (scancel)" in found["why"]
    assert (slurm.state(job), slurm.state(after)) == ("CANCELLED", "CANCELLED")
    (row,) = record.endings(run)
    assert row["cause"] == "cancelled" and row["after"] >= 6 and "saved at step" in row["why"]
    text = status.table(status.status(run))
    assert "stopped: the job was cancelled (scancel); saved at step" in text and "alive" not in text
    start(steps=row["after"] + 4, seconds=0.01)  # resumed
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["cancelled", "finished"]


def test_scancel_ends_the_run_though_its_ranks_do_not_end(slurm: Cluster, start: Start) -> None:
    run, job = start({"0": [6, "freeze"]}, steps=5000)
    reach(run, 6)
    wait_for_successor(run, job)
    slurm.call("scancel", str(job))
    found = verdict(run)
    until(lambda: not queue(run), "a job of a cancelled run is left in the queue")
    assert found["state"] == "stopped" and slurm.state(job) == "CANCELLED"


def test_scancel_ends_the_run_though_slurm_does_not_answer_its_supervisor(slurm: Cluster, start: Start, tmp_path: Path) -> None:
    silent, programs = tmp_path / "silent", tmp_path / "bin"
    programs.mkdir()
    for name in ("scontrol", "squeue", "scancel"):
        real = shutil.which(name, path=slurm.environment["PATH"])
        (programs / name).write_text(f"#!/bin/sh\nwhile [ -e '{silent}' ]; do sleep 0.2; done\nexec {real} \"$@\"\n")
        (programs / name).chmod(0o755)
    run, job = start(steps=5000, setup=(f"export PATH={programs}:$PATH",))
    reach(run, 6)
    after = wait_for_successor(run, job)
    silent.touch()
    slurm.call("scancel", str(job))
    slurm.wait(after, "RUNNING")
    silent.unlink()
    found = verdict(run)
    assert found["state"] == "stopped" and f"job {job} was cancelled" in found["why"]
    until(lambda: not queue(run), "a job of a cancelled run is left in the queue")
    assert slurm.state(job) == "CANCELLED" and slurm.state(after) == "COMPLETED"
    assert len(record.endings(run)) == 1, "the successor trained"


def test_a_requeue_by_hand_leaves_one_job(slurm: Cluster, start: Start) -> None:
    run, job = start(steps=60)
    reach(run, 6)
    wait_for_successor(run, job)
    slurm.call("scontrol", "requeue", str(job))
    until(lambda: queue(run) == [(job, "PENDING")], f"the queue should hold job {job} only, and holds {queue(run)}")
    assert causes(run) == ["requeued"] and not record.final_state(run)
    log = (run.path / "logs" / f"batch-{job}.log").read_text()
    assert "error" not in log.replace("slurmstepd", "").lower().split("fovea:", 1)[1].replace("error: ***", ""), log
    assert status.status(run).state == "waiting"
    start_now(slurm, job)  # spares the test two minutes
    assert verdict(run)["state"] == "finished"
    until(lambda: not queue(run), "a job of a finished run is left in the queue")
    assert [row["job"] for row in record.endings(run)] == [job, job]


def test_a_run_requeued_by_hand_and_then_cancelled_does_not_come_back(slurm: Cluster, start: Start) -> None:
    run, job = start(steps=5000)
    reach(run, 6)
    wait_for_successor(run, job)
    slurm.call("scontrol", "requeue", str(job))
    until(lambda: queue(run) == [(job, "PENDING")], "the requeued job is not alone")
    slurm.call("scancel", str(job))
    until(lambda: not queue(run), "a cancelled run is in the queue")
    one = status.status(run)
    assert one.state == "idle" and f"job {job} was cancelled" in one.why


def preempt(slurm: Cluster, folder: Path) -> int:
    """Submits a job that takes all nodes; its number."""
    urgent = folder / "urgent.sh"
    urgent.write_text("#!/bin/bash\n#SBATCH --partition=urgent --nodes=2 --exclusive --output=/dev/null\nsleep 3\n")
    return int(slurm.call("sbatch", "--parsable", str(urgent)))


def test_a_job_preempted_by_requeue_is_succeeded_at_once(slurm: Cluster, start: Start, tmp_path: Path) -> None:
    run, job = start(steps=60)
    reach(run, 6)
    after = wait_for_successor(run, job)
    preempt(slurm, tmp_path)
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["preempted", "finished"] and record.endings(run)[0]["after"] >= 6
    assert [row["job"] for row in record.endings(run)] == [job, after]
    assert moment(after, "EligibleTime") - record.endings(run)[0]["ended_at"] < 60, "Slurm's two minutes were waited for"
    until(lambda: not queue(run), "a job of a finished run is left in the queue")
    assert slurm.state(job) == "CANCELLED"


def test_a_job_that_preemption_cancels_is_succeeded_at_once(slurm: Cluster, start: Start, tmp_path: Path) -> None:
    run, job = start(steps=60, partition="cancelling")
    reach(run, 6)
    after = wait_for_successor(run, job)
    other = preempt(slurm, tmp_path)
    slurm.wait(other, "COMPLETED")
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["preempted", "finished"] and slurm.state(job) == "PREEMPTED"
    assert [row["job"] for row in record.endings(run)] == [job, after]
    assert moment(after, "EligibleTime") - moment(job, "EndTime") < 60


def test_a_lost_node_is_called_so(slurm: Cluster, start: Start) -> None:
    run, job = start(steps=60)
    reach(run, 6)
    after = wait_for_successor(run, job)
    slurm.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    until(lambda: causes(run) == ["node"], "the loss is not recorded")
    slurm.call("scontrol", "update", "nodename=n2", "state=resume", check=False)  # refused if it came back by itself
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["node", "finished"] and [row["job"] for row in record.endings(run)] == [job, after]
    assert moment(after, "EligibleTime") - record.endings(run)[0]["ended_at"] < 60
    until(lambda: not queue(run), "a job of a finished run is left in the queue")


def test_ranks_that_hang_at_the_time_limit_are_given_up_and_the_run_comes_back(slurm: Cluster, start: Start) -> None:
    run, job = start({"0": [6, "freeze"]}, steps=400, time="2", checkpoint_lead_time=60)
    reach(run, 1, attempt=1)
    first = record.endings(run)[0]
    assert slurm.state(job) == "COMPLETED" and first["cause"] == "time limit" and "no time was left to save" in first["why"]
    record.request(run, record.STOP, "enough")
    assert verdict(run)["state"] == "stopped"


def test_a_killed_supervisor_is_succeeded(slurm: Cluster, start: Start) -> None:
    run, job = start(steps=120)
    reach(run, 6)
    after = wait_for_successor(run, job)
    os.kill(supervisor_of(run), signal.SIGKILL)
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["supervisor", "finished"]
    assert [row["job"] for row in record.endings(run)] == [job, after] and slurm.state(job) == "FAILED"
    until(lambda: not queue(run), "a job of a finished run is left in the queue")


def test_ranks_that_die_start_again_within_their_job_as_often_as_allowed(start: Start) -> None:
    deaths = {str(attempt): [2 + 4 * attempt, "kill"] for attempt in range(3)}
    run, job = start(deaths, "launch.restarts=2", steps=24)
    after = wait_for_successor(run, job)
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["crash", "crash", "crash", "finished"]
    assert [row["job"] for row in record.endings(run)] == [job, job, job, after], "the third restart is not allowed"
    log = (run.path / "logs" / f"batch-{job}.log").read_text()
    assert "start again in this job, 1 restarts left" in log and "start again in this job, 0 restarts left" in log


def test_where_no_second_job_is_allowed_the_job_is_requeued(slurm: Cluster, start: Start, tmp_path: Path) -> None:
    refusing = tmp_path / "bin" / "sbatch"
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/sh\necho 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2\nexit 1\n")
    refusing.chmod(0o755)
    run, job = start({"0": [6, "kill"]}, steps=30, setup=(f"export PATH={refusing.parent}:$PATH",))
    until(lambda: "ended_at" in (record.endings(run) or [{}])[0], "the attempt did not end")
    until(lambda: queue(run) == [(job, "PENDING")], "the job is not requeued")
    log = (run.path / "logs" / f"batch-{job}.log").read_text()
    assert "no successor could be submitted" in log and "QOSMaxSubmitJobPerUserLimit" in log and "requeued instead" in log
    start_now(slurm, job)
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["crash", "finished"]


def test_without_a_successor_the_same_job_comes_back(slurm: Cluster, start: Start) -> None:
    run, job = start(steps=5000, requeue_mode="requeue")
    reach(run, 6)
    assert queue(run) == [(job, "RUNNING")]
    slurm.call("scancel", "--batch", "-s", "USR2", str(job))
    until(lambda: queue(run) == [(job, "PENDING")], "the job is not requeued")
    assert causes(run) == ["signal"] and not record.final_state(run)
    start_now(slurm, job)
    reach(run, 1, attempt=1)
    slurm.call("scancel", str(job))
    assert verdict(run)["state"] == "stopped"
    until(lambda: not queue(run), "a cancelled run is in the queue")
    assert causes(run) == ["signal", "cancelled"]


def test_a_supervisor_that_another_job_has_replaced_ends_its_ranks(start: Start) -> None:
    run, _ = start(steps=5000)
    reach(run, 6)
    run.write("live.json", {"job": 4_000_000, "life": 0, "host": "elsewhere"})
    until(lambda: not ranks_of(run), "its ranks go on")
    fovea("cancel", str(run.path))


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_becomes_full_ends_the_attempt_and_not_the_run(slurm: Cluster, start: Start, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("no file system can be mounted")
    try:
        run, job = start({"0": [12, "fill"]}, steps=60, folder="small/run", preflight={"disk_gb": 0.0})
        wait_for_successor(run, job)
        until(lambda: [state for _, state in queue(run)] == ["PENDING"], "the full disk has not ended the attempt")
        other = successor(run, 0)
        assert moment(other, "EligibleTime") > time.time() + 60, "the successor does not wait for space"
        assert not record.final_state(run)
        (run.path / "fill").unlink()
        start_now(slurm, other)
        assert verdict(run)["state"] == "finished"
        assert [row["job"] for row in record.endings(run)][-1] == other and causes(run)[-1] == "finished"
        print(json.dumps(record.endings(run), indent=1))
    finally:
        until(lambda: not subprocess.run(["umount", str(small)], check=False, capture_output=True).returncode, "it is in use")


@pytest.mark.parametrize("kill_wait", [5])
def test_scancel_ends_the_run_within_a_short_kill_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_wait: int) -> None:
    with cluster(tmp_path / "c", extra={"KillWait": str(kill_wait)}, defaults=True) as made:
        run, job = starter(made, tmp_path, monkeypatch)({"0": [6, "freeze"]}, steps=5000)
        reach(run, 6)
        wait_for_successor(run, job)
        made.call("scancel", str(job))
        assert verdict(run)["state"] == "stopped"
        until(lambda: not queue(run), "a job of a cancelled run is left in the queue")
        assert made.state(job) == "CANCELLED" and len(record.endings(run)) == 1


def test_a_long_kill_wait_costs_nothing_where_the_ranks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 300 s nobody is killed in time: what ends must end by itself, and the supervisor must not wait for the killing."""
    with cluster(tmp_path / "c", extra={"KillWait": "300"}, defaults=True) as made:
        begin = starter(made, tmp_path, monkeypatch)
        cancelled, job = begin(steps=5000)
        reach(cancelled, 6)
        wait_for_successor(cancelled, job)
        made.call("scancel", str(job))
        until(lambda: "saved at step" in record.final_state(cancelled).get("why", ""), "the ranks did not save")
        until(lambda: not queue(cancelled), "a job of a cancelled run is left in the queue")
        requeued, job = begin(steps=5000, folder="b")
        reach(requeued, 6)
        wait_for_successor(requeued, job)
        made.call("scontrol", "requeue", str(job))
        until(lambda: queue(requeued) == [(job, "PENDING")], "the requeued job is not alone")
        assert causes(requeued) == ["requeued"]
        fovea("cancel", str(requeued.path))
