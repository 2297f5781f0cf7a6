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

# What may end differently at once and on the same machine: not a full disk, nor a machine that computes wrongly.
RESTARTABLE = ("crash", "hang", "rendezvous")

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
        supervisor: attempts whose supervisor was killed or failed itself.
        disk: attempts ended by a full disk; each successor waits some minutes for space.
        no_progress: consecutive attempts without a newer checkpoint, whatever ended them.
    """

    crash: int = 3
    hang: int = 3
    node: int = 5
    rendezvous: int = 3
    supervisor: int = 3
    disk: int = 12
    no_progress: int = 3

    def of(self, cause: str) -> int | None:
        """The number of attempts that a cause may end; ``None`` if it is not limited."""
        return getattr(self, cause) if cause in ("crash", "hang", "node", "rendezvous", "supervisor", "disk") else None


@dataclass(frozen=True)
class AttemptResult:
    """Facts about the attempt that has just ended.

    Attributes:
        code: exit code of ``srun``.
        outcome: rank 0's record of an orderly end, or ``None``.
        failure: the first failing rank's record, or ``None``.
        stop_reason: why the supervisor asked the ranks to stop (``time limit``, ``preempted``, ``cancelled``…), or empty.
        hung: whether the supervisor ended it because no rank wrote a heartbeat.
        before, after: step of the newest checkpoint at its start and now; -1 for none.
        bad_nodes: nodes that failed preflight, with the reasons.
        everywhere: whether all of several nodes failed preflight: then no single node is at fault.
        full: a full disk and what is on it, as a sentence, or empty.
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
    full: str = ""


@dataclass(frozen=True)
class Decision:
    """The next action.

    Attributes:
        action: ``finish``, ``stop`` (requested by the user, or the job was cancelled), ``fail`` or ``requeue``.
        cause: for the accounting: finished, stopped, cancelled, time limit, preempted, requeued, signal, crash, hang, node,
            rendezvous, disk, refused or nonfinite; supervisor for an attempt whose supervisor could not record its end.
        why: explanation for the user.
        exclude: nodes to avoid from now on, with the reasons.
        spent: whether the run gives up since a budget is used up.
    """

    action: str
    cause: str
    why: str
    exclude: Mapping[str, str] = field(default_factory=dict)
    spent: bool = False


def classify(end: AttemptResult) -> tuple[str, str]:
    """Classify the end of an attempt: one word, and an explanation."""
    if end.stop_reason == "cancelled" and (end.outcome or {}).get("stop") != "FINISHED":
        saved = f"saved at step {end.outcome.get('step')}" if end.outcome is not None else "nothing was saved after the signal"
        return "cancelled", f"the job was cancelled (scancel); {saved}"
    if end.full and not end.bad_nodes and end.outcome is None:
        return "disk", end.full
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
        if cause in ("node", "rendezvous", "nonfinite", "disk"):
            return cause, what
        if end.failure.get("retryable") is False:
            return "refused", what
        return "node" if _MACHINE.search(what) else "crash", what
    if end.stop_reason:
        return end.stop_reason, "no time was left to save"
    return "crash", f"the ranks ended with code {end.code} without a message (killed, or out of memory?)"


def decide(end: AttemptResult, history: Sequence[Mapping[str, Any]], budgets: Budgets) -> Decision:
    """Decide what to do after an attempt.

    Args:
        end: facts about its end.
        history: the attempts before it, oldest first, each with ``cause``, ``before``, ``after`` and ``why``.
        budgets: how often each cause may occur.
    """
    cause, why = classify(end)
    if end.bad_nodes and end.everywhere and end.full and history and history[-1].get("cause") == "disk":
        cause = "disk"  # it became full during the run, and still is
    if cause == "finished":
        return Decision("finish", cause, why)
    if cause in ("stopped", "cancelled"):
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
        and end.failure is not None  # a rank that was killed left no message: it need not be the same again
        and any(row.get("cause") == "crash" and row.get("why") == why for row in history[-1:])
        and end.after <= end.before
    ):
        return Decision("fail", cause, f"twice in a row, from the same checkpoint: {why}")
    rows = [*history, {"before": end.before, "after": end.after, "cause": cause, "why": why}]
    if gives_up := spent(rows, budgets):
        return Decision("fail", cause, gives_up, exclude, spent=True)
    return Decision("requeue", cause, why, exclude)


def spent(history: Sequence[Mapping[str, Any]], budgets: Budgets) -> str:
    """Whether the last attempt exhausted a budget: why the run gives up, or empty.

    Args:
        history: all attempts, oldest first, each with ``cause``, ``before``, ``after`` and ``why``.
        budgets: how often each cause may occur.
    """
    if not history:
        return ""
    cause, why = str(history[-1].get("cause")), history[-1].get("why")
    budget, count = budgets.of(cause), sum(row.get("cause") == cause for row in history)
    if budget is not None and count > budget:
        return f"{count} attempts ended by {cause}, {budget} are allowed: {why}"
    idle = 0
    for row in reversed(history):
        if int(row.get("after", -1)) > int(row.get("before", -1)) or row.get("cause") in ("node", "disk"):
            break
        idle += row.get("cause") not in ("stopped", "cancelled")
    if idle >= budgets.no_progress:
        return f"{idle} attempts in a row left no newer checkpoint; the last: {why}"
    return ""
