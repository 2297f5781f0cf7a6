"""Requests to stop, noted by signal handlers and acted on by all ranks together at a step boundary."""

from __future__ import annotations

import contextlib
import signal
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist


class Stop(IntEnum):
    """Why a run stops; the largest of all ranks wins.

    ``PREEMPTED``: the job's supervisor ends the attempt. ``USER_REQUEST``: a person wants the run to stop.
    """

    NO = 0
    FINISHED = 1
    SIGHUP = 2
    SIGUSR1 = 3
    SIGUSR2 = 4
    SIGTERM = 5
    SIGINT = 6
    PREEMPTED = 7
    USER_REQUEST = 8


_SIGNALS = {
    signal.SIGHUP: Stop.SIGHUP,
    signal.SIGUSR1: Stop.SIGUSR1,
    signal.SIGUSR2: Stop.SIGUSR2,
    signal.SIGTERM: Stop.SIGTERM,
    signal.SIGINT: Stop.SIGINT,
}


class StopRequests:
    """Requests by signal, whose handlers only set a flag, and by file, which one rank looks for once a second.

    Args:
        folder: where files ``stop``, ``stop-<attempt>`` and ``save`` are looked for; ``None`` on all ranks but one.
        attempt: the attempt's number.

    Attributes:
        asked: what this rank was asked for.
        saving: after :meth:`agreed`, the largest state that any rank told of its part of a save.
        save: after :meth:`agreed`, whether a person wants a checkpoint now.
    """

    def __init__(self, folder: Path | None = None, attempt: int = 0) -> None:
        self.asked = Stop.NO
        self.saving, self.save = 0, False
        self._folder, self._attempt, self._looked = folder, attempt, 0.0

    def listen(self) -> None:
        """Install the handlers (main thread only). An ignored SIGHUP stays ignored: ``nohup`` wants the run to go on."""
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = max(self.asked, _SIGNALS[signal.Signals(number)])

    def agreed(self, group: dist.ProcessGroup | None, saving: int = 0) -> Stop:
        """What all ranks do now: one small all-reduce on the host, the same answer everywhere.

        Args:
            group: the ranks' group on the host.
            saving: this rank's part of a save; what all make of it is in :attr:`saving` afterwards.
        """
        save = self._look()
        code = torch.tensor([int(self.asked), saving, save], dtype=torch.int32)
        dist.all_reduce(code, op=dist.ReduceOp.MAX, group=group)
        self.saving, self.save = int(code[1]), bool(code[2])
        return Stop(int(code[0]))

    def watch(self, folder: Path, attempt: int) -> None:
        """Look for files from now on."""
        self._folder, self._attempt = folder, attempt

    def _look(self) -> bool:
        """Read the files' requests, at most once a second; whether a checkpoint is wanted."""
        now = time.monotonic()
        if self._folder is None or now - self._looked < 1.0:
            return False
        self._looked = now
        if (self._folder / f"stop-{self._attempt}").exists():
            self.asked = max(self.asked, Stop.PREEMPTED)
        if (self._folder / "stop").exists():
            self.asked = max(self.asked, Stop.USER_REQUEST)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "save").unlink()
            return True
        return False
