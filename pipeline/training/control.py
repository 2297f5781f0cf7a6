"""Requests to stop, noted by signal handlers and acted on by all ranks together at a step boundary."""

from __future__ import annotations

import signal
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist


class Stop(IntEnum):
    """Why a run stops; the largest asked for by any rank wins."""

    NO = 0
    FINISHED = 1
    SIGUSR1 = 2
    SIGUSR2 = 3
    SIGTERM = 4
    SIGINT = 5


_SIGNALS = {
    signal.SIGUSR1: Stop.SIGUSR1,
    signal.SIGUSR2: Stop.SIGUSR2,
    signal.SIGTERM: Stop.SIGTERM,
    signal.SIGINT: Stop.SIGINT,
}


class StopRequests:
    """Flag-only signal handlers: nothing is saved inside a handler.

    Attributes:
        asked: what this rank was asked for.
        saving: after :meth:`agreed`, the largest state that any rank told of its part of a save.
    """

    def __init__(self) -> None:
        self.asked = Stop.NO
        self.saving = 0

    def listen(self) -> None:
        """Install the handlers (main thread only)."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = max(self.asked, _SIGNALS[signal.Signals(number)])

    def agreed(self, group: dist.ProcessGroup | None, saving: int = 0) -> Stop:
        """What all ranks do now: one small all-reduce on the host, the same answer everywhere.

        Args:
            group: the ranks' group on the host.
            saving: this rank's part of a save; what all make of it is in :attr:`saving` afterwards.
        """
        code = torch.tensor([int(self.asked), saving], dtype=torch.int32)
        dist.all_reduce(code, op=dist.ReduceOp.MAX, group=group)
        self.saving = int(code[1])
        return Stop(int(code[0]))
