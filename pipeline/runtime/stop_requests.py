"""Collects stop requests from signals and files; all ranks act on them together at a step boundary."""

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
    """Why a run stops; the maximum over all ranks applies.

    ``PREEMPTED``: the job's supervisor ends the attempt. ``USER_REQUEST``: a user wants the run to stop.
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
    """Stop requests by signal, whose handlers only set a flag, and by file, which one rank checks once per second.

    Args:
        folder: directory of the files ``stop``, ``stop-<attempt>`` and ``save``; ``None`` on all ranks but one.
        attempt: the attempt's number.

    Attributes:
        requested: the request that this rank received.
        saving, snapshot: after :meth:`agreed`, the maxima over all ranks of the states of their parts of a save and of a
            snapshot.
        save: after :meth:`agreed`, whether a user requested a checkpoint.
    """

    def __init__(self, folder: Path | None = None, attempt: int = 0) -> None:
        self.requested = Stop.NO
        self.saving, self.snapshot, self.save = 0, 0, False
        self._folder, self._attempt, self._looked = folder, attempt, 0.0

    def listen(self) -> None:
        """Installs the signal handlers (main thread only). An ignored SIGHUP stays ignored, so that ``nohup`` works."""
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = max(self.requested, _SIGNALS[signal.Signals(number)])

    def agreed(self, group: dist.ProcessGroup | None, saving: int = 0, snapshot: int = 0) -> Stop:
        """Returns what all ranks do now: one small all-reduce on the host, with the same result on every rank.

        Args:
            group: the ranks' group on the host.
            saving, snapshot: the states of this rank's parts of a save and of a snapshot; the maxima over all ranks are then
                in the attributes of these names.
        """
        save = self._look()
        code = torch.tensor([int(self.requested), saving, save, snapshot], dtype=torch.int32)
        dist.all_reduce(code, op=dist.ReduceOp.MAX, group=group)
        self.saving, self.save, self.snapshot = int(code[1]), bool(code[2]), int(code[3])
        return Stop(int(code[0]))

    def watch(self, folder: Path, attempt: int) -> None:
        """Starts checking for request files."""
        self._folder, self._attempt = folder, attempt

    def _look(self) -> bool:
        """Reads the request files, at most once per second; returns whether a checkpoint is requested."""
        now = time.monotonic()
        if self._folder is None or now - self._looked < 1.0:
            return False
        self._looked = now
        if (self._folder / f"stop-{self._attempt}").exists():
            self.requested = max(self.requested, Stop.PREEMPTED)
        if (self._folder / "stop").exists():
            self.requested = max(self.requested, Stop.USER_REQUEST)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "save").unlink()
            return True
        return False
