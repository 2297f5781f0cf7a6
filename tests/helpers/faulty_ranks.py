"""``fovea train`` whose ranks fail on purpose.

Run ``python -m tests.helpers.faulty_ranks train …`` with ``FAULT=<rank> <step> <place> <kind>``, and with ``DELAYED=1`` to have
the host read a step later whether a step was applied, as on a GPU. Several faults of an attempt are separated by commas; after a
semicolon come those of the next attempt, and without one every attempt has the same. ``hold`` is no fault: the rank waits until
it has received a signal, so that a test that sends one at a step cannot come too late.

The product has no hook for this: the process that starts the ranks makes them this module too, which wraps what is to break.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from typing import Any

import torch

_signalled: list[int] = []


def _hold() -> None:
    end = time.monotonic() + 1200  # a test that failed before it sent the signal leaves no rank for ever
    while not _signalled and time.monotonic() < end:
        time.sleep(0.01)


def _break(kind: str) -> None:
    if kind == "hold":
        return _hold()
    if kind == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if kind == "memory":
        raise MemoryError
    if kind == "bug":
        raise KeyError("a mistake of ours")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(36000)


_flipped: list[bool] = []


def _flip_once(method: Any) -> None:
    """Flip a bit of a weight, as a fault of the memory does, in the first pass of the step only."""
    if not _flipped:
        _flipped.append(True)
        next(method.parameters()).detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 12)


def _arm(rank: int, step: int, place: str, kind: str, last: int) -> None:
    from pipeline.data.loader.batch_stream import BatchStream
    from pipeline.runtime.stop_requests import StopRequests
    from pipeline.training.engine import Engine
    from pipeline.training.rollback import SkippedSteps

    here = int(os.environ["RANK"]) == rank
    forward_backward, engine_step, batches = Engine.forward_backward, Engine.step, BatchStream.__iter__
    add, note = SkippedSteps.add, StopRequests._note

    def noted(self: StopRequests, number: int, frame: Any) -> None:
        note(self, number, frame)
        _signalled.append(number)

    def broken_forward(self: Engine, batch: Any, now: Any) -> Any:
        if here and now.index == step and place == "forward" and kind == "flip":
            _flip_once(self.method)
        elif here and now.index == step and place == "forward" and kind != "nan":
            _break(kind)
        terms = forward_backward(self, batch, now)
        if here and step <= now.index <= last and kind == "nan":
            terms = {name: term * float("nan") for name, term in terms.items()}
        return terms

    def broken_step(self: Engine, now: Any, finite: Any) -> Any:
        if here and now.index == step and place == "step":
            _break(kind)
        return engine_step(self, now, finite)

    def broken_data(self: BatchStream) -> Any:
        for number, micro_batches in batches(self):
            if here and number == step and place == "data":
                _break(kind)
            yield number, micro_batches

    def broken_rollback(self: SkippedSteps, *arguments: Any, **named: Any) -> None:
        add(self, *arguments, **named)
        if here and place == "back":
            _break(kind)

    SkippedSteps.add, StopRequests._note = broken_rollback, noted  # type: ignore[method-assign]
    Engine.forward_backward, Engine.step, BatchStream.__iter__ = broken_forward, broken_step, broken_data  # type: ignore[method-assign]


def _delay() -> None:
    from pipeline.training.engine import Engine

    build = Engine.__init__

    def built(self: Engine, method: Any, options: Any, device: Any) -> None:
        build(self, method, replace(options, delay=True), device)

    Engine.__init__ = built  # type: ignore[method-assign]


def main() -> int:
    """The command line if there is no rank yet, else a rank."""
    if "RANK" not in os.environ:
        from launch import local
        from launch.cli import main as cli

        start = local.start

        def replaced(argv: list[str], *arguments: Any, **named: Any) -> int:
            return start(
                ["tests.helpers.faulty_ranks" if word == "launch.rank_main" else word for word in argv], *arguments, **named
            )

        local.start = replaced  # type: ignore[assignment]
        cli.main()
        return 0
    if os.environ.get("DELAYED"):
        _delay()
    attempts = os.environ["FAULT"].split(";")
    number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if sys.argv[1] == "train" else sys.argv[2]
    attempt = int(number) if len(attempts) > 1 else 0
    for fault in attempts[attempt].split(",") if attempt < len(attempts) else ():
        if fault:
            rank, step, place, kind, *rest = fault.split()
            _arm(int(rank), int(step), place, kind, int(rest[0]) if rest else int(step))
    if sys.argv[1] == "train":
        from launch.cli import main as cli

        cli.main()
        return 0
    from launch import rank_main as worker

    return worker.main()


if __name__ == "__main__":
    code = main()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
