"""Classifies the end of an attempt and decides what to do next; pure functions. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Words in a rank's last message that indicate a hardware fault rather than a program error.
_MACHINE = re.compile(
    r"\bECC\b|\bXid\b|uncorrectable|unhandled system error|NVLink|CUDA error: (unknown|device-side|hardware)", re.I
)

SIGNAL_CAUSES = {
    "PREEMPTED": "requeued",
    "SIGTERM": "preempted",
    "SIGUSR1": "signal",
    "SIGUSR2": "signal",
    "SIGINT": "signal",
    "SIGHUP": "signal",
}


@dataclass(frozen=True)
class Budgets:
    """How many attempts each cause may end before the run gives up.

    Attributes:
        crash: exceptions of the program, and ranks that were killed.
        hang: hung ranks.
        node: node failures.
        rendezvous: starts at which the ranks could not connect.
        no_progress: consecutive attempts without a newer checkpoint, whatever ended them.
    """

    crash: int = 3
    hang: int = 3
    node: int = 5
    rendezvous: int = 3
    no_progress: int = 3


@dataclass(frozen=True)
class AttemptResult:
    """Facts about the attempt that has just ended.

    Attributes:
        code: exit code of ``srun``.
        outcome: rank 0's record of an orderly end, or ``None``.
        failure: the first failing rank's record, or ``None``.
        stop_reason: why the supervisor asked the ranks to stop (``time limit``, ``preempted``), or empty.
        hung: whether the supervisor ended it because no rank wrote a heartbeat.
        before, after: step of the newest checkpoint at its start and now; -1 for none.
        bad_nodes: nodes that failed preflight, with the reasons.
        everywhere: whether all of several nodes failed preflight: then no single node is at fault.
    """

    code: int = 0
    outcome: Mapping[str, Any] | None = None
    failure: Mapping[str, Any] | None = None
    stop_reason: str = ""
    hung: bool = False
    before: int = -1
    after: int = -1
    bad_nodes: Mapping[str, str] = field(default_factory=dict)
    everywhere: bool = False


@dataclass(frozen=True)
class Decision:
    """The next action.

    Attributes:
        action: ``finish``, ``stop`` (requested by the user), ``fail`` or ``requeue``.
        cause: for the accounting: finished, stopped, time limit, preempted, signal, crash, hang, node, rendezvous, refused or
            nonfinite.
        why: explanation for the user.
        exclude: nodes to avoid from now on, with the reasons.
    """

    action: str
    cause: str
    why: str
    exclude: Mapping[str, str] = field(default_factory=dict)


def classify(end: AttemptResult) -> tuple[str, str]:
    """Classify the end of an attempt: one word, and an explanation."""
    if end.bad_nodes and end.everywhere:
        return "refused", f"every node is at fault: {'; '.join(sorted(set(end.bad_nodes.values())))}"
    if end.bad_nodes:
        return "node", "; ".join(f"{node}: {why}" for node, why in end.bad_nodes.items())
    stop = str(end.outcome.get("stop")) if end.outcome is not None else ""
    # When one rank fails, Slurm ends the others; that they managed to save does not make it a preemption.
    echo = stop.startswith("SIG") and not end.stop_reason and (end.failure is not None or end.code != 0)
    if end.outcome is not None and not echo:
        if stop == "FINISHED":
            return "finished", f"all {end.outcome.get('steps')} steps are done"
        if stop == "USER_REQUEST":
            return "stopped", f"stopped by request at step {end.outcome.get('step')}"
        cause = end.stop_reason or SIGNAL_CAUSES.get(stop, "signal")
        return cause, f"saved at step {end.outcome.get('step')}"
    what = str((end.failure or {}).get("what", ""))
    cause = str((end.failure or {}).get("cause", "crash"))
    if end.hung or cause == "hang":
        return "hang", what or "no rank sent a heartbeat"
    if end.failure is not None:
        if cause in ("node", "rendezvous", "nonfinite"):
            return cause, what
        if end.failure.get("retryable") is False:
            return "refused", what
        return "node" if _MACHINE.search(what) else "crash", what
    if end.stop_reason:
        return end.stop_reason, f"{end.stop_reason}, and no time was left to save"
    return "crash", f"the ranks ended with code {end.code} without a message (killed, or out of memory?)"


def decide(end: AttemptResult, history: Sequence[Mapping[str, Any]], budgets: Budgets) -> Decision:
    """Decide what to do after an attempt.

    Args:
        end: facts about its end.
        history: the attempts before it, oldest first, each with ``cause``, ``before``, ``after`` and ``why``.
        budgets: how often each cause may occur.
    """
    cause, why = classify(end)
    if cause == "finished":
        return Decision("finish", cause, why)
    if cause == "stopped":
        return Decision("stop", cause, why)
    if cause == "refused":
        return Decision("fail", cause, why)
    if cause == "nonfinite":
        return Decision("fail", cause, why)
    exclude = dict(end.bad_nodes)
    if cause == "node" and not exclude and (host := (end.failure or {}).get("node")):
        exclude = {str(host): why}
    if (
        cause == "crash"
        and any(row.get("cause") == "crash" and row.get("why") == why for row in history[-1:])
        and end.after <= end.before
    ):
        return Decision("fail", cause, f"twice in a row, from the same checkpoint: {why}")
    budget = {"crash": budgets.crash, "hang": budgets.hang, "node": budgets.node, "rendezvous": budgets.rendezvous}.get(cause)
    before = sum(row.get("cause") == cause for row in history)
    if budget is not None and before + 1 > budget:
        return Decision("fail", cause, f"{before + 1} attempts ended by {cause}, {budget} are allowed: {why}", exclude)
    idle = 0
    for row in [*history, {"before": end.before, "after": end.after, "cause": cause}][::-1]:
        if int(row.get("after", -1)) > int(row.get("before", -1)) or row.get("cause") == "node":
            break
        idle += 1
    if idle >= budgets.no_progress:
        return Decision("fail", cause, f"{idle} attempts in a row left no newer checkpoint; the last: {why}", exclude)
    return Decision("requeue", cause, why, exclude)
