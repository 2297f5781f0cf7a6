"""Limits that only catch what would go on for ever: they say nothing about how fast a machine is."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

HANGS = 1500.0  # seconds of a single test: ten times what the longest takes on a free machine
LONG = 1200.0  # seconds in which anything that a test waits for has happened, on the slowest and busiest machine


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Ends the test if the block takes so many CPU seconds of this process; give many times what it takes."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise AssertionError(f"it took more than {seconds:g} s of CPU time")

    with _timer(signal.ITIMER_PROF, signal.SIGPROF, seconds, stop):
        yield


@contextlib.contextmanager
def hang_limit(seconds: float = LONG) -> Iterator[None]:
    """Ends the test if the block takes so long; give many times what it takes, and less than it would wait if it were wrong."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise AssertionError(f"it did not end in {seconds:g} s")

    with _timer(signal.ITIMER_REAL, signal.SIGALRM, seconds, stop):
        yield


@contextlib.contextmanager
def _timer(which: int, number: int, seconds: float, stop: object) -> Iterator[None]:
    before = signal.signal(number, stop)  # type: ignore[arg-type]
    left, _ = signal.setitimer(which, seconds)  # of a limit around this one
    try:
        yield
    finally:
        signal.setitimer(which, 0)
        signal.signal(number, before)
        signal.setitimer(which, left)


def deadline(seconds: float = LONG) -> float:
    """Moment, on the monotonic clock, at which a wait is given up."""
    return time.monotonic() + seconds
