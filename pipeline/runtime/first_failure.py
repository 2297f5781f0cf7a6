"""Reports failures of ranks: one message from the first, one line from those that failed because of it.

The rank that fails first claims ``failure.json`` in the attempt's log directory. A rank whose collective failed looks there for
the cause before it reports anything. Only files and stderr are used, so this works under fovea's launcher, torchrun, accelerate
and srun.
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import FoveaError, failure_fields, of_system
from pipeline.masking import shown
from pipeline.runtime import failure_claim as claims
from pipeline.runtime.watchdog import RESTART, Watchdog

_COLLECTIVE = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "timed out waiting", "tcpstore")
_HOST_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "std::bad_alloc")
_LESS = (
    "Lower train.micro_batch_size (now {micro_batch}; results are the same where the method allows accumulation), "
    "raise train.zero_stage (now {zero}), use activation checkpointing or more ranks; `fovea estimate` shows what fits"
)


@dataclass(frozen=True)
class Failure:
    """Classification of an exception.

    Attributes:
        what, hint: for the message.
        code: exit code of the process.
        because_of_others: whether another rank's failure may have caused it.
        expected: whether the message is sufficient, so that no traceback is needed.
    """

    what: str
    hint: str = ""
    code: int = 1
    because_of_others: bool = False
    expected: bool = True


def read(error: BaseException, facts: dict[str, Any]) -> Failure:
    """Classifies an exception of a rank.

    Args:
        error: the exception that ended training.
        facts: ``micro_batch`` and ``zero``, for the hint.
    """
    text = shown(" ".join(str(error).split()))
    if isinstance(error, FoveaError):
        return Failure(str(error), code=error.exit_code)
    if isinstance(error, torch.OutOfMemoryError):
        return Failure(f"out of GPU memory: {text[:300]}", _LESS.format(**facts))
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _HOST_MEMORY):
        hint = f"Lower data.prefetch or data.num_workers. {_LESS.format(**facts)}"
        return Failure(f"out of host memory: {text[:300] or type(error).__name__}", hint)
    if isinstance(error, OSError) and (known := of_system(error)) is not None:
        return Failure(str(known))
    broken = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _COLLECTIVE)
    )
    if broken:
        return Failure(f"a collective failed ({text[:200]})", "Resume with the same command", RESTART, because_of_others=True)
    return Failure(f"{type(error).__name__}: {text[:500]}", expected=False)


def report_failure(error: BaseException, watchdog: Watchdog, facts: dict[str, Any]) -> int:
    """Reports the exception that ended this rank on stderr; returns the exit code."""
    failure = read(error, facts)
    phase, step = watchdog.position
    position = f"rank {watchdog.rank}, {phase}, step {step}"
    what, hint = failure.what, failure.hint
    cause = claims.claimed(watchdog.folder) if not failure.because_of_others else _wait_for_claim(watchdog, 1.5)
    if failure.because_of_others and cause is None:
        timed_out = "timed out" in what.lower() or "timeout" in what.lower()
        blamed, sentence = watchdog.diagnose(waits=True)
        cause = claims.claimed(watchdog.folder)
        if blamed != [watchdog.rank] or timed_out:
            known = [rank for rank in blamed if rank != watchdog.rank]
            logs = f"; see the log of rank {known[0]} and of its machine" if known else ""
            reason = "a collective took longer than launch.timeout" if timed_out else "the connection to another rank broke"
            what, hint = f"{reason}: {sentence}", f"Resume with the same command{logs}"
    own: dict[str, Any] = {"rank": watchdog.rank, "what": what, "code": failure.code, "step": step, **failure_fields(error)}
    if cause is None and claims.claim(watchdog.folder, own):
        if isinstance(error, OSError):
            with contextlib.suppress(OSError), watchdog.stacks.open("a") as file:
                file.write(f"--- {position}\n{shown(''.join(traceback.format_exception(error)))}")
        if not failure.expected:
            print(shown("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        _print(f"error: {position}: {what}" + (f". {hint}" if hint else ""))
        return failure.code
    cause = cause or _wait_for_claim(watchdog, 1.0) or own
    with contextlib.suppress(OSError), watchdog.stacks.open("a") as file:
        file.write(f"--- {position}\n{shown(''.join(traceback.format_exception(error)))}")
    time.sleep(0.5)  # so that the launcher sees the first failure first
    same = isinstance(error, FoveaError) and (cause["kind"], cause["step"]) == (
        own["kind"],
        own["step"],
    )  # all ranks raise it
    if failure.because_of_others or cause["what"] == what or same:
        _print(f"rank {watchdog.rank} ends because of rank {cause['rank']}: {cause['what']}")
        return int(cause["code"])
    _print(f"error: {position}, after rank {cause['rank']} had failed: {what}" + (f". {hint}" if hint else ""))
    return failure.code


def _wait_for_claim(watchdog: Watchdog, seconds: float) -> dict[str, Any] | None:
    end = time.monotonic() + seconds
    while (claim := claims.claimed(watchdog.folder)) is None and time.monotonic() < end:
        time.sleep(0.05)
    return claim


def _print(text: str) -> None:
    sys.stdout.flush()
    print(shown(text), file=sys.stderr, flush=True)
