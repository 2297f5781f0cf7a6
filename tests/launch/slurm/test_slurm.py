"""A real Slurm of two nodes, and ranks that train nothing: what becomes of a run when things go wrong around it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.slurm import status
from pipeline.errors import LaunchError
from pipeline.runtime import job_record as record
from tests.helpers.cluster_runs import Start, causes, fovea, queue, reach, starter, until, verdict
from tests.helpers.slurm import NEEDS_SLURM, PREEMPTION, Cluster, cluster, preempting

pytestmark = NEEDS_SLURM


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm") / "c", extra=PREEMPTION, partitions=preempting(grace=15)) as made:
        yield made


@pytest.fixture
def start(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Submits a run whose ranks follow a plan; the run and its job."""
    return starter(slurm, tmp_path, monkeypatch)


def test_a_run_is_submitted_once_and_ends_finished(slurm: Cluster, start: Start) -> None:
    run, job = start()
    assert verdict(run)["state"] == "finished"
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert causes(run) == ["finished"]
    one = status.status(run)
    assert (one.state, one.step) == ("finished", 8) and 0 < one.goodput.share <= 1
    logs = sorted(path.name for path in run.logs(0).glob("rank-*.log"))
    assert logs == ["rank-0.log", "rank-1.log"]
    assert {path.stem for path in (run.logs(0) / "preflight").glob("*.json")} == {"n1", "n2"}


def test_a_second_job_on_a_run_is_refused_while_the_first_lives(start: Start) -> None:
    run, job = start(steps=40)
    with pytest.raises(LaunchError, match=f"job {job} of this run"):
        start(steps=40)
    record.request(run, record.STOP, "enough")
    assert verdict(run)["state"] == "stopped"


def test_a_crash_is_tried_again_and_the_same_crash_twice_is_the_end(slurm: Cluster, start: Start) -> None:
    run, job = start({"0": [6, "crash"], "1": [6, "crash"]})
    found = verdict(run)
    assert found["state"] == "failed" and "twice in a row" in found["why"] and "broken at 6" in found["why"]
    assert causes(run) == ["crash", "crash"]
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"  # the first attempt's job; the second's failed
    assert slurm.wait(int(record.endings(run)[1]["job"]), "COMPLETED", "FAILED") == "FAILED"


def test_a_killed_rank_is_no_end(start: Start) -> None:
    run, _ = start({"0": [6, "kill"]})
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["crash", "finished"]


def test_a_refusal_is_not_tried_again(start: Start) -> None:
    run, _ = start({"0": [0, "refuse"]})
    found = verdict(run)
    assert (found["state"], found["why"]) == ("failed", "no such shard")
    assert causes(run) == ["refused"]


def test_ranks_that_do_not_meet_are_started_again_in_the_same_attempt(start: Start) -> None:
    run, _ = start({"0": [-1, "meet"]})
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["finished"]
    assert (run.logs(0) / "failure-meeting.json").exists()


def test_a_rank_that_leaves_early_does_not_keep_the_others_waiting(start: Start) -> None:
    run, _ = start({"0": [5, "quiet"]}, steps=200)
    reach(run, 6)
    end = time.monotonic() + 40
    while "ended_at" not in record.endings(run)[0]:
        assert time.monotonic() < end, "the attempt goes on without rank 1"
        time.sleep(0.2)
    record.request(run, record.STOP, "enough")
    assert verdict(run)["state"] == "stopped"


def test_ranks_that_stand_still_are_ended_and_started_again(start: Start) -> None:
    run, _ = start({"0": [6, "freeze"]}, hang_timeout=6)
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["hang", "finished"]


def test_the_warning_before_the_time_limit_saves_and_requeues(slurm: Cluster, start: Start) -> None:
    run, job = start(steps=60)
    reach(run, 6)
    slurm.call("scancel", "--batch", "-s", "USR2", str(job))
    reach(run, 1, attempt=1)
    record.request(run, record.STOP, "enough")
    assert verdict(run)["state"] == "stopped"
    first = record.endings(run)[0]
    assert first["cause"] == "signal" and first["after"] >= 6, "it was half an hour before its limit"


def test_a_real_time_limit_is_met_with_a_checkpoint_in_hand(start: Start) -> None:
    run, _ = start(steps=5000, time="1", checkpoint_lead_time=25)
    reach(run, 1, attempt=1, seconds=200)
    record.request(run, record.STOP, "enough")
    assert verdict(run)["state"] == "stopped"
    first = record.endings(run)[0]
    assert first["cause"] == "time limit" and first["after"] > 10
    assert first["ended_at"] - first["started_at"] < 60, "it did not end before its limit"


def test_a_step_whose_daemon_was_killed_does_not_hold_the_run_for_ever(start: Start) -> None:
    run, job = start(steps=60, hang_timeout=8)
    reach(run, 6)
    daemons = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _says(entry, f"[{job}.1]")]
    assert daemons
    os.kill(max(daemons), signal.SIGKILL)
    assert verdict(run)["state"] == "finished"


def _says(entry: Path, words: str) -> bool:
    try:
        text = (entry / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return "slurmstepd" in text and words in text


def test_a_requeue_by_the_administrator_saves_and_goes_on(slurm: Cluster, start: Start) -> None:
    run, job = start(steps=40)
    reach(run, 6)
    slurm.call("scontrol", "requeue", str(job))
    assert verdict(run)["state"] == "finished"
    first = record.endings(run)[0]
    assert first["cause"] == "requeued" and first["after"] >= 6


def test_a_preempted_run_comes_back_by_itself(slurm: Cluster, start: Start, tmp_path: Path) -> None:
    run, _ = start(steps=60)
    reach(run, 6)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\n#SBATCH --partition=urgent --nodes=2 --exclusive --output=/dev/null\nsleep 3\n")
    other = int(slurm.call("sbatch", "--parsable", str(urgent)))
    slurm.wait(other, "COMPLETED", seconds=120)
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["preempted", "finished"]
    assert record.endings(run)[0]["after"] >= 6


def test_a_node_that_is_lost_costs_no_more_than_what_was_not_saved(slurm: Cluster, start: Start) -> None:
    run, _ = start(steps=50)
    reach(run, 6)
    slurm.call("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    time.sleep(1)
    slurm.call("scontrol", "update", "nodename=n1", "state=resume", check=False)  # refused if it came back by itself
    assert verdict(run)["state"] == "finished"
    assert causes(run)[0] in ("node", "preempted") and causes(run)[-1] == "finished"
    assert record.endings(run)[0]["after"] >= 4


def test_where_preempted_jobs_are_cancelled_a_successor_takes_over(slurm: Cluster, start: Start, tmp_path: Path) -> None:
    run, job = start(steps=60, requeue_mode="chain", partition="cancelling")
    reach(run, 6)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\n#SBATCH --partition=urgent --nodes=2 --exclusive --output=/dev/null\nsleep 3\n")
    slurm.call("sbatch", str(urgent))
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["preempted", "finished"] and record.endings(run)[-1]["job"] != job
    assert slurm.state(job) == "PREEMPTED"
    until(lambda: not queue(run), "a successor of a finished run is left in the queue")


def test_a_person_stops_and_resumes(slurm: Cluster, start: Start) -> None:
    run, job = start(steps=300)
    reach(run, 5)

    assert "saves and stops" in fovea("stop", str(run.path))
    assert verdict(run)["state"] == "stopped"
    slurm.wait(job, "COMPLETED")
    assert "stopped" in fovea("status", str(run.path)) and "rank 0" in fovea("logs", str(run.path))
    start(steps=300, seconds=0.01)
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["stopped", "finished"]


def test_what_preflight_finds_on_every_node_is_told_and_no_node_is_blamed(start: Start) -> None:
    run, _ = start(preflight={"disk_gb": 1e9})
    found = verdict(run)
    assert found["state"] == "failed" and "free of 1e+09 required" in found["why"]
    assert not record.excluded(run) and not list(run.logs(0).glob("rank-*.log"))


@pytest.mark.parametrize(("wanted", "state"), [(1e-6, "finished"), (1e6, "failed")])
def test_nodes_that_are_badly_connected_are_not_trained_on(start: Start, wanted: float, state: str) -> None:
    run, _ = start(preflight={"disk_gb": 0.01, "bandwidth_gbps": wanted}, budgets={"node": 1})
    found = verdict(run, 200)
    assert found["state"] == state, found
    assert record.read(run.logs(0) / "links.json")["ranks"] == 2
    if state == "failed":
        assert "of 1e+06 required" in found["why"]


def test_requeue_now_ends_the_ranks_without_saving_and_the_successor_takes_over(start: Start) -> None:
    run, job = start(steps=50_000, seconds=0.1)
    reach(run, 6)
    until(lambda: len(queue(run)) == 2, "no successor waits")
    assert "without saving" in fovea("requeue", str(run.path), "--now")
    reach(run, 1, attempt=1)
    record.request(run, record.STOP, "enough")
    assert verdict(run)["state"] == "stopped" and causes(run) == ["requeued", "stopped"]
    first, second = record.endings(run)
    assert first["job"] == job != second["job"]
    assert first["after"] % 4 == 0, "the newest checkpoint is one of the interval, none was saved for this"
