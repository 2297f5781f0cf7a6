"""Job steps that a supervisor starts with ``srun``, waits for and ends. Standard library only."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.slurm import memory_keepers
from launch.slurm import slurm_commands as tools
from pipeline.errors import LaunchError

_PORTS = range(61001, 65536)  # above the range for outgoing connections
_TICK = 0.5


class Step:
    """A running job step.

    Args:
        job: job ID.
        command: ``srun`` and its arguments.
        environment: variables of ``srun``.
    """

    def __init__(self, job: int, command: Sequence[str], environment: dict[str, str]) -> None:
        self._job = job
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)

    def wait(self, look: Callable[[], str], seconds: float = float("inf")) -> int:
        """Wait for the end of the step; returns the exit code of ``srun``, or 137 if the step was ended here.

        Args:
            look: called twice per second; returns why the step must be ended now: ``kill`` ends its processes at once, ``end``
                as Slurm ends a job. Empty as long as it may go on.
            seconds: after this time its processes are ended at once.
        """
        begun = time.monotonic()
        while (code := self._process.poll()) is None:
            time.sleep(_TICK)
            how = look() or ("kill" if time.monotonic() - begun > seconds else "")
            if how:
                self._end(at_once=how == "kill")
                return 137
        return code if code >= 0 else 128 - code

    def _end(self, *, at_once: bool) -> None:
        """End the processes even if a node's Slurm daemon is gone; those that cannot be killed are not waited for."""
        options = ["--signal=KILL"] if at_once else []
        with contextlib.suppress(LaunchError):
            listed = tools.call("squeue", "--noheader", "--steps", f"--jobs={self._job}", "--format=%i %j", limit=5)
            for step, name in (line.split(None, 1) for line in listed.splitlines() if " " in line.strip()):
                if step.partition(".")[2].isdigit() and name.strip() != memory_keepers.STEP:
                    tools.cancel(step, *options, limit=5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=3 if at_once else 30)
        if not at_once:  # otherwise the job ends now, and Slurm ends srun with it
            self._process.kill()


def filled(argument: str, logs: Path) -> str:
    """An argument of ``srun`` with the attempt's log directory; in Slurm's file patterns ``%`` is written twice."""
    own = str(logs).replace("%", "%%") if argument.startswith("--output=") else str(logs)
    return argument.replace("%LOGS%", own)


def free_port() -> int:
    """A port on which the ranks can meet; 0 if none is free."""
    for port in random.SystemRandom().sample(_PORTS, 200):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    return 0
