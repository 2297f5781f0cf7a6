"""What happens after an attempt, as a table."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from launch.slurm.decide import AttemptResult as Result
from launch.slurm.decide import Budgets, decide
from pipeline.config.load import InvalidConfig
from pipeline.data.storage import ShardChanged, StorageUnavailable
from pipeline.errors import (
    CheckpointError,
    ConfigError,
    LaunchError,
    NonFiniteError,
    RendezvousError,
    TrainingError,
    failure_fields,
)


def done(stop: str, step: int = 9) -> dict[str, Any]:
    return {"stop": stop, "step": step, "steps": 24}


def failed(error: BaseException | str, what: str = "it broke", **more: Any) -> dict[str, Any]:
    record = failure_fields(error) if isinstance(error, BaseException) else {"kind": error, "cause": error, "retryable": True}
    return {"rank": 1, "what": what, "code": 1, "step": 5, **record, **more}


class Deeper(CheckpointError):
    """A class that nobody has listed."""


def row(cause: str, before: int = 0, after: int = 1, why: str = "") -> dict[str, Any]:
    return {"cause": cause, "before": before, "after": after, "why": why}


@pytest.mark.parametrize(
    ("end", "history", "action", "cause"),
    [
        (Result(outcome=done("FINISHED", 24)), [], "finish", "finished"),
        (Result(outcome=done("USER_REQUEST")), [], "stop", "stopped"),
        (Result(outcome=done("PREEMPTED"), stop_reason="time limit", before=0, after=9), [], "requeue", "time limit"),
        (Result(outcome=done("PREEMPTED"), stop_reason="preempted", before=0, after=9), [], "requeue", "preempted"),
        (Result(outcome=done("SIGTERM"), before=0, after=9), [], "requeue", "preempted"),
        (Result(outcome=done("PREEMPTED"), before=0, after=9), [], "requeue", "requeued"),
        (Result(code=137, stop_reason="preempted", before=0, after=6), [], "requeue", "preempted"),
        (Result(code=1, outcome=done("SIGTERM"), failure=failed(ValueError()), before=0, after=6), [], "requeue", "crash"),
        (Result(code=137, failure=failed(RuntimeError()), before=0, after=6), [], "requeue", "crash"),
        (Result(code=137, before=0, after=6), [], "requeue", "crash"),
        (Result(code=2, failure=failed(ConfigError("x"))), [], "fail", "refused"),
        (Result(code=2, failure=failed(CheckpointError("x"))), [], "fail", "refused"),
        (Result(code=2, failure=failed(Deeper("x"))), [], "fail", "refused"),
        (Result(code=2, failure=failed(InvalidConfig([]))), [], "fail", "refused"),
        (Result(code=2, failure=failed(ShardChanged("x"))), [], "fail", "refused"),
        (Result(code=2, failure=failed(StorageUnavailable("x")), before=0, after=6), [], "requeue", "crash"),
        (Result(code=2, failure=failed(LaunchError("no GPU"))), [], "fail", "refused"),
        (Result(code=1, failure=failed("node", "an all-reduce ran slowly"), after=6), [], "requeue", "node"),
        (Result(code=1, failure={"what": "an old record"}, after=6), [], "requeue", "crash"),
        (Result(code=1, failure=failed(OSError(errno.ENOSPC, "No space left on device")), after=6), [], "requeue", "disk"),
        (Result(code=2, failure=failed(CheckpointError("x")), full="the disk is full", after=6), [], "requeue", "disk"),
        (Result(code=0, stop_reason="cancelled"), [], "stop", "cancelled"),
        (Result(outcome=done("SIGTERM"), stop_reason="requeued", before=0, after=9), [], "requeue", "requeued"),
        (Result(code=1, failure=failed(NonFiniteError("x"), "10 steps in a row were not finite")), [], "fail", "nonfinite"),
        (Result(code=1, failure=failed(TrainingError("x"), "too many bad samples")), [], "fail", "refused"),
        (Result(code=75, failure=failed("hang", "rank 1 has been in data at step 5 for 400 s"), after=6), [], "requeue", "hang"),
        (Result(code=137, hung=True, before=0, after=6), [], "requeue", "hang"),
        (Result(code=2, failure=failed(RendezvousError("x"), "address in use"), after=6), [], "requeue", "rendezvous"),
        (Result(code=1, failure=failed(RuntimeError(), "uncorrectable ECC error", node="n7"), after=6), [], "requeue", "node"),
        (Result(bad_nodes={"n2": "7 of 8 GPUs respond"}), [], "requeue", "node"),
        (Result(bad_nodes={"n1": "no disk", "n2": "no disk"}, everywhere=True), [], "fail", "refused"),
        (Result(code=137, outcome=done("SIGTERM"), before=0, after=6), [], "requeue", "crash"),
    ],
)  # fmt: skip
def test_each_ending_has_its_cause_and_its_consequence(
    end: Result, history: list[dict[str, Any]], action: str, cause: str
) -> None:
    decision = decide(end, history, Budgets())
    assert (decision.action, decision.cause) == (action, cause)
    assert decision.why


def test_a_broken_machine_is_kept_away_from() -> None:
    preflight = decide(Result(bad_nodes={"n2": "its disk is full"}), [], Budgets())
    assert preflight.exclude == {"n2": "its disk is full"}
    gpu = decide(Result(code=1, failure=failed(RuntimeError(), "Xid 79", node="n7"), after=6), [], Budgets())
    assert list(gpu.exclude) == ["n7"]
    program = decide(Result(code=1, failure=failed(RuntimeError(), "index out of range", node="n7"), after=6), [], Budgets())
    assert not program.exclude


def test_the_same_crash_twice_from_the_same_checkpoint_is_the_end() -> None:
    history = [row("crash", 6, 6, "index out of range")]
    again = Result(code=1, failure=failed(IndexError(), "index out of range"), before=6, after=6)
    assert decide(again, history, Budgets()).action == "fail"
    other = Result(code=1, failure=failed(IndexError(), "something else"), before=6, after=6)
    assert decide(other, history, Budgets()).action == "requeue"
    further = Result(code=1, failure=failed(IndexError(), "index out of range"), before=6, after=12)
    assert decide(further, history, Budgets()).action == "requeue"
    assert decide(again, [], Budgets()).action == "requeue"
    assert decide(again, [*history, row("hang", 6, 6)], Budgets(no_progress=9)).action == "requeue"  # not in a row
    assert decide(again, [row("hang", 6, 6, "index out of range")], Budgets()).action == "requeue"


@pytest.mark.parametrize(
    ("cause", "end"),
    [
        ("crash", Result(code=137, before=6, after=12)),
        ("hang", Result(hung=True, before=6, after=12)),
        ("node", Result(bad_nodes={"n1": "full disk"}, before=6, after=12)),
        ("rendezvous", Result(failure=failed(RendezvousError("x")), before=6, after=12)),
    ],
)
def test_each_cause_has_a_budget_of_its_own(cause: str, end: Result) -> None:
    budgets = Budgets(crash=2, hang=2, node=2, rendezvous=2, no_progress=99)
    assert decide(end, [row(cause, why="a"), *[row("preempted")] * 9], budgets).action == "requeue"
    assert decide(end, [row(cause, why="a"), row(cause, why="b")], budgets).action == "fail"


def test_preemption_is_forgiven_as_long_as_there_is_progress() -> None:
    end = Result(outcome=done("PREEMPTED"), stop_reason="preempted", before=50, after=51)
    assert decide(end, [row("preempted", i, i + 1) for i in range(50)], Budgets()).action == "requeue"


def test_attempts_that_leave_nothing_are_not_repeated_for_ever() -> None:
    idle = Result(stop_reason="preempted", before=6, after=6)
    assert decide(idle, [row("preempted", 6, 6)], Budgets(no_progress=3)).action == "requeue"
    assert decide(idle, [row("preempted", 6, 6)] * 2, Budgets(no_progress=3)).action == "fail"
    assert decide(idle, [row("preempted", 6, 6), row("preempted", 0, 6)], Budgets(no_progress=3)).action == "requeue"
    assert decide(idle, [row("preempted", 6, 6), row("node", 6, 6)], Budgets(no_progress=2)).action == "requeue"
    assert decide(idle, [row("preempted", 0, 6), *[row("preempted", 6, 6)] * 2], Budgets(no_progress=3)).action == "fail"
    assert decide(idle, [*[row("preempted", 6, 6)] * 2, row("preempted", 0, 6)], Budgets(no_progress=3)).action == "requeue"


def test_an_attempt_of_which_nothing_is_known_left_no_checkpoint() -> None:
    assert (Result().before, Result().after) == (-1, -1)
    idle = Result(stop_reason="preempted")
    assert decide(idle, [{"cause": "preempted"}], Budgets(no_progress=2)).action == "fail"
    assert decide(idle, [{"cause": "preempted", "before": -1}], Budgets(no_progress=2)).action == "fail"
    assert decide(idle, [{"cause": "preempted", "after": 0}], Budgets(no_progress=2)).action == "requeue"


@pytest.mark.parametrize(("cause", "allowed"), [("crash", 3), ("hang", 3), ("node", 5), ("rendezvous", 3)])
def test_the_default_budgets(cause: str, allowed: int) -> None:
    end = Result(code=1, failure=failed(cause), before=6, after=12)
    assert decide(end, [row(cause)] * (allowed - 1), Budgets()).action == "requeue"
    assert decide(end, [row(cause)] * allowed, Budgets()).action == "fail"
    assert Budgets().no_progress == 3
