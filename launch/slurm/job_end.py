"""Asks Slurm why a job is being ended, or why it has ended, and watches its time limit. Standard library only.

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
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.slurm import slurm_commands as tools
from pipeline.errors import LaunchError

CANCELLED, TIME_LIMIT, PREEMPTED, REQUEUED, NODE, SIGNAL = "cancelled", "time limit", "preempted", "requeued", "node", "signal"
_MARGIN = 15.0  # seconds before the time limit at which ranks that are still there are given up
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


class JobWatch:
    """When and why the job of this process ends: its signals, what Slurm says about them, and its time limit.

    Args:
        job: job ID.
        life: how often it had been requeued when this batch step began.
        log: the batch step's output.
        lead: seconds before the time limit at which the ranks must stop.

    Attributes:
        end: what Slurm does to the job, once it has been asked about a signal.
        reason: why the ranks must stop; empty as long as they may go on.
    """

    def __init__(self, job: int, life: int, log: Path, lead: float) -> None:
        self.end: JobEnd | None = None
        self.reason = ""
        self._job, self._life, self._log, self._lead = job, life, log, lead
        self._signals: list[int] = []
        self._answered = 0  # signals about which Slurm has been asked
        self._limit = self._deadline = float("inf")
        self._kill_wait = 30.0

    def listen(self) -> None:
        """Note all signals from now on."""
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: self._signals.append(received))

    def begin(self) -> None:
        """Ask Slurm for the time limit and ``KillWait``."""
        self._limit = self._end_time(self._limit)
        with contextlib.suppress(LaunchError, ValueError, KeyError, IndexError):
            self._kill_wait = float(tools.settings(limit=20)["KillWait"].split()[0])

    @property
    def patience(self) -> float:
        """Seconds for which a command of Slurm may be waited for while the job ends."""
        return max(self._kill_wait / 3, 2.0)

    @property
    def too_late(self) -> bool:
        """Whether nothing can be waited for any more: 15 s before the time limit, 5 s before the end of ``KillWait``."""
        return time.time() > min(self._limit - min(_MARGIN, self._lead / 2), self._deadline)

    def look(self) -> str:
        """Look at signals and the clock; returns :attr:`reason`."""
        if len(self._signals) > self._answered:
            self._ask()
        elif not self.reason and time.time() > self._limit - self._lead:
            self._limit = self._end_time(self._limit)  # which an administrator may have extended
            if time.time() > self._limit - self._lead:
                self.reason = TIME_LIMIT
        return self.reason

    def _ask(self) -> None:
        """Ask Slurm what the signals mean; again at the next look if it does not answer."""
        count, terminated = len(self._signals), signal.SIGTERM in self._signals
        if terminated and self._deadline == float("inf"):
            self._deadline = time.time() + self._kill_wait - min(5.0, self._kill_wait / 3)
        end = of_running(self._job, self._life, self._log, limit=self.patience)
        if end is None:
            self.reason = self.reason or (PREEMPTED if terminated else SIGNAL)
            return
        self._answered, self.end = count, end
        if end.ending:
            self.reason = end.cause
            return
        self._deadline = float("inf")
        near = time.time() > self._limit - self._lead - 120
        warned = end.cause == SIGNAL and near and signal.SIGUSR2 in self._signals
        self.reason = self.reason or (TIME_LIMIT if warned else end.cause)

    def _end_time(self, unknown: float) -> float:
        """Wall-clock time at which Slurm will end the job; its own warning comes up to a minute early, or never."""
        with contextlib.suppress(LaunchError, ValueError):
            return time.mktime(time.strptime(tools.facts(self._job, limit=20).get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
        return unknown


def of_ended(job: int) -> str:
    """State in which a job ended, as Slurm names it; empty if it has not ended or is not known.

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
