"""Why Slurm ends a job, as Slurm 22.05.8 showed it in each case."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from launch.slurm import job_end
from launch.slurm import slurm_commands as tools
from launch.slurm.job_end import JobEnd, JobWatch, read
from pipeline.errors import LaunchError


def facts(state: str, **more: str) -> dict[str, str]:
    return {"JobState": state, "Reason": "None", "Restarts": "0", "PreemptTime": "None", **more}


@pytest.mark.parametrize(
    ("shown", "life", "line", "end"),
    [
        (facts("COMPLETING"), 0, "", JobEnd("cancelled")),  # scancel
        (facts("COMPLETING", Restarts="2"), 2, "", JobEnd("cancelled")),  # scancel of a job that was requeued before
        (facts("COMPLETING", Reason="TimeLimit"), 0, "TIME LIMIT", JobEnd("time limit")),
        (facts("COMPLETING", Restarts="1"), 0, "JOB REQUEUE", JobEnd("requeued", returns=True)),
        (facts("COMPLETING", Restarts="1"), 0, "PREEMPTION", JobEnd("preempted", returns=True)),
        (facts("PENDING", Restarts="1", Reason="BeginTime"), 0, "NODE FAILURE", JobEnd("node", returns=True)),
        (facts("PENDING", Restarts="1", Reason="job_requeued_in_held_state"), 0, "", JobEnd("requeued", returns=True)),
        (facts("COMPLETING", PreemptTime="2026-11-30T04:32:49"), 0, "PREEMPTION", JobEnd("preempted")),  # by cancelling it
        (facts("RUNNING", PreemptTime="2026-11-30T04:32:49"), 0, "", JobEnd("preempted", ending=False)),  # GraceTime
        (facts("RUNNING"), 0, "", JobEnd("signal", ending=False)),
        (facts("SUSPENDED"), 0, "", JobEnd("signal", ending=False)),
        (facts("CANCELLED"), 0, "", JobEnd("cancelled")),  # versions that name the state beside COMPLETING
        (facts("TIMEOUT"), 0, "", JobEnd("time limit")),
        (facts("NODE_FAIL"), 0, "", JobEnd("node")),
    ],
)
def test_each_end_is_recognized_by_what_slurm_shows(shown: dict[str, str], life: int, line: str, end: JobEnd) -> None:
    assert read(shown, life, line) == end


def test_the_reason_of_a_requeue_is_in_the_batch_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "batch-7.log"
    log.write_text(
        "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-30T04:31:50 DUE TO JOB REQUEUE ***\n"
        "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-30T04:33:51 DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***\n"
    )
    monkeypatch.setattr(tools, "facts", lambda *_, **__: facts("PENDING", Restarts="2"))
    assert job_end.of_running(7, 1, log) == JobEnd("node", returns=True)
    assert job_end.of_running(7, 1, tmp_path / "none.log") == JobEnd("requeued", returns=True)


def test_a_slurm_that_does_not_answer_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> dict[str, str]:
        raise LaunchError("did not answer within 60 s")

    monkeypatch.setattr(tools, "facts", silent)
    monkeypatch.setattr(tools, "call", silent)
    assert job_end.of_running(7, 0, tmp_path) is None
    assert job_end.of_ended(7) == ""


@pytest.mark.parametrize(
    ("controller", "accounting", "state"),
    [
        ("CANCELLED", "", "CANCELLED"),
        ("COMPLETING", "", ""),
        ("RUNNING", "", ""),
        ("", "CANCELLED by 1000\n", "CANCELLED"),
        ("", "NODE_FAIL\nTIMEOUT\n", "TIMEOUT"),
        ("", "", ""),
    ],
)
def test_what_the_controller_has_forgotten_the_accounting_knows(
    controller: str, accounting: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "facts", lambda *_, **__: {"JobState": controller} if controller else {})
    monkeypatch.setattr(tools, "call", lambda *_, **__: accounting)
    assert job_end.of_ended(7) == state


def test_a_path_with_blanks_is_no_fact_about_a_job() -> None:
    line = "JobId=7 JobName=toy JobState=RUNNING Restarts=0 Command=/my runs/x Restarts=5/script.sbatch WorkDir=/a=b"
    facts = tools.pairs(line)
    assert (facts["JobState"], facts["Restarts"], facts["WorkDir"]) == ("RUNNING", "0", "/a=b")


# ---- how long the ranks may take to end ------------------------------------------------------------------------------------


class Clock:
    """The time, and what Slurm says at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kill_wait: int, limit: float = 1e9) -> None:
        self.now, self.answer = 1000.0, JobEnd("cancelled")
        self.silent = False
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(tools, "settings", lambda **_: {"KillWait": f"{kill_wait} sec"})
        monkeypatch.setattr(JobWatch, "_end_time", lambda *_: limit)
        monkeypatch.setattr(job_end, "of_running", lambda *_, **__: None if self.silent else self.answer)


def receive(watch: JobWatch, number: int = signal.SIGTERM) -> None:
    """As the handler of a signal does."""
    watch._signals.append(number)


@pytest.mark.parametrize(("kill_wait", "given"), [(5, 5 - 5 / 3), (10, 10 - 10 / 3), (30, 25), (300, 295)])
@pytest.mark.parametrize("cause", ["cancelled", "requeued", "time limit", "preempted", "node"])
def test_ranks_are_given_up_shortly_before_slurm_kills_the_supervisor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kill_wait: int, given: float, cause: str
) -> None:
    clock = Clock(monkeypatch, kill_wait)
    watch = JobWatch(7, 0, tmp_path, lead=60)
    watch.begin()
    clock.answer = JobEnd(cause)
    assert watch.look() == "" and not watch.too_late
    receive(watch)
    assert watch.look() == cause
    clock.now = 1000 + given - 0.1
    assert not watch.too_late, "the ranks lose time in which they could save"
    clock.now = 1000 + given + 0.1
    assert watch.too_late and clock.now < 1000 + kill_wait
    assert watch.patience <= max(kill_wait / 3, 2)


@pytest.mark.parametrize("kill_wait", [5, 300])
def test_a_silent_slurm_is_asked_again_and_does_not_move_the_deadline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kill_wait: int
) -> None:
    clock = Clock(monkeypatch, kill_wait)
    watch = JobWatch(7, 0, tmp_path, lead=60)
    watch.begin()
    clock.silent = True
    receive(watch)
    assert watch.look() == "preempted", "the ranks save meanwhile"
    clock.now += kill_wait / 2
    receive(watch)
    clock.silent = False
    assert watch.look() == "cancelled"
    clock.now = 1000.0 + kill_wait
    assert watch.too_late


def test_a_warning_is_no_end_whatever_kill_wait_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch, 300, limit=1100.0)
    watch = JobWatch(7, 0, tmp_path, lead=60)
    watch.begin()
    clock.answer = JobEnd("signal", ending=False)
    receive(watch, signal.SIGUSR2)
    assert watch.look() == "time limit" and not watch.too_late
    clock.now = 1085.5
    assert watch.too_late, "15 s before the limit"
