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
    """Flag-only signal handlers: nothing is saved inside a handler."""

    def __init__(self) -> None:
        self.asked = Stop.NO

    def listen(self) -> None:
        """Install the handlers (main thread only)."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = max(self.asked, _SIGNALS[signal.Signals(number)])

    def agreed(self, group: dist.ProcessGroup | None) -> Stop:
        """What all ranks do now: one small all-reduce on the host, the same answer everywhere."""
        code = torch.tensor([int(self.asked)], dtype=torch.int32)
        dist.all_reduce(code, op=dist.ReduceOp.MAX, group=group)
        return Stop(int(code))
