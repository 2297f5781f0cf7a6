"""Asks Slurm why a job is being ended, or why it has ended. Standard library only.

While a job ends, ``squeue`` and ``scontrol`` name its state COMPLETING, whatever the reason (measured with Slurm 22.05.8; later
versions may name both states). What tells the reasons apart until the batch step is killed, ``KillWait`` seconds later:

====================================================  =======================================================
requeued: by hand, by preemption, after a lost node   ``Restarts`` exceeds the batch step's count, or PENDING
time limit                                            ``Reason=TimeLimit``
preempted where preempted jobs are cancelled          ``PreemptTime`` is set
``scancel`` by a person or an administrator           none of these
====================================================  =======================================================

A job in the state RUNNING has only received a signal: Slurm's warning, the beginning of a preemption's ``GraceTime``, or
``scancel --signal``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.slurm import slurm_commands as tools
from pipeline.errors import LaunchError

CANCELLED, TIME_LIMIT, PREEMPTED, REQUEUED, NODE, SIGNAL = "cancelled", "time limit", "preempted", "requeued", "node", "signal"
_NOT_SET = ("", "None", "(null)", "Unknown", "N/A")
_LINE = re.compile(rb"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+ DUE TO ([A-Z ]+)")
_BY_LINE = {"PREEMPTION": PREEMPTED, "NODE FAILURE": NODE}
_OVER = re.compile(r"CANCELLED|COMPLETED|FAILED|TIMEOUT|NODE_FAIL|PREEMPTED|BOOT_FAIL|DEADLINE|OUT_OF_MEMORY")


@dataclass(frozen=True)
class JobEnd:
    """What Slurm does to the job of a batch step.

    Attributes:
        cause: cancelled, time limit, preempted, requeued, node, or signal while the job goes on.
        ending: whether Slurm is ending the job, so that the batch step is killed after ``KillWait``.
        returns: whether Slurm itself has put the job back into the queue.
    """

    cause: str
    ending: bool = True
    returns: bool = False


def of_running(job: int, life: int, log: Path, *, limit: float = 10.0) -> JobEnd | None:
    """What Slurm does to the job that this process belongs to; ``None`` if Slurm does not answer.

    Args:
        job: job ID.
        life: how often it had been requeued when this batch step began.
        log: the batch step's output, in which Slurm names the reason of a requeue.
        limit: seconds in which Slurm must answer.
    """
    try:
        facts = tools.facts(job, limit=limit)
    except LaunchError:
        return None
    return read(facts, life, _line(log)) if facts else None


def read(facts: Mapping[str, str], life: int, line: str = "") -> JobEnd:
    """Reads the output of ``scontrol show job``.

    Args:
        facts: as :func:`launch.slurm.slurm_commands.facts` returns them.
        life: how often the job had been requeued when its batch step began.
        line: reason in the batch step's output, such as ``PREEMPTION``.
    """
    state, restarts = facts.get("JobState", ""), facts.get("Restarts", "0")
    preempted = facts.get("PreemptTime", "") not in _NOT_SET
    if (state in tools.WAITING and state != "SUSPENDED") or (restarts.isdecimal() and int(restarts) > life):
        return JobEnd(next((cause for text, cause in _BY_LINE.items() if line.startswith(text)), REQUEUED), returns=True)
    if state in ("RUNNING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "RESIZING", "STOPPED"):
        return JobEnd(PREEMPTED if preempted else SIGNAL, ending=False)
    if "TIMEOUT" in state or facts.get("Reason") == "TimeLimit":
        return JobEnd(TIME_LIMIT)
    if preempted or "PREEMPTED" in state:
        return JobEnd(PREEMPTED)
    return JobEnd(NODE if "NODE_FAIL" in state else CANCELLED)


def of_ended(job: int) -> str:
    """State in which a job ended, as Slurm names it; empty if it has not ended, or if nobody knows.

    The controller forgets a job ``MinJobAge`` seconds after its end (300 by default); then only the accounting knows.
    """
    state = ""
    with contextlib.suppress(LaunchError):
        state = tools.facts(job).get("JobState", "")
    if not state:
        try:
            rows = tools.call("sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}")
            state = rows.split("\n")[-2] if "\n" in rows else rows
        except LaunchError:
            return ""
    match = _OVER.search(state)
    return match.group() if match else ""


def _line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - (64 << 10), 0))
            reasons = _LINE.findall(file.read())
    except OSError:
        return ""
    return reasons[-1].decode() if reasons else ""
