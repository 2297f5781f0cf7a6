"""Who is blamed, when, and how it ends; with a clock of the test's own and no other rank than one thread."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.runtime.watchdog import CHECKPOINT, COMPUTE, DATA, EVALUATE, RESTART, STEP, Limits, Pulse, Watchdog, find_hung_ranks
from tests.helpers.limits import LONG, deadline


def pulse(
    rank: int, *, beat: int = 1, entered: int = 10, phase: str = STEP, seconds: float = 310.0, waiting: bool = False
) -> Pulse:
    return Pulse(rank, beat, entered, phase, 1234, seconds, waiting, False, "host", 1)


def judged(first: list[Pulse], second: list[Pulse], size: int, gone: list[int] | None = None) -> tuple[list[int], str]:
    return find_hung_ranks({p.rank: p for p in first}, {p.rank: p for p in second}, size, gone or [], 0)


def test_whoever_entered_the_fewest_phases_is_waited_for() -> None:
    first = [pulse(0), pulse(1), pulse(2, entered=8, phase=DATA)]
    second = [pulse(0, beat=2), pulse(1, beat=2), pulse(2, beat=2, entered=8, phase=DATA)]
    assert judged(first, second, 3) == (
        [2],
        "rank 2 has been in data at step 1234 for 310 s; the others wait for it in step",
    )


def test_in_one_phase_the_one_outside_of_collectives_is_waited_for() -> None:
    second = [pulse(0, beat=2, phase=COMPUTE, waiting=True), pulse(1, beat=2, phase=COMPUTE)]
    blamed, sentence = judged([pulse(0, beat=1), pulse(1, beat=1)], second, 2)
    assert blamed == [1] and "wait for it in forward and backward" in sentence


def test_a_rank_without_pulse_is_blamed_before_one_that_is_behind() -> None:
    first = [pulse(0), pulse(1), pulse(2, entered=8)]
    second = [pulse(0, beat=2), pulse(1, beat=1), pulse(2, beat=2, entered=8)]
    assert judged(first, second, 3) == ([1], "rank 1 does not respond; last heartbeat in step at step 1234")
    assert judged(first, second, 3, gone=[1])[1].startswith("rank 1 has exited;")
    assert judged([pulse(0)], [pulse(0, beat=2)], 3) == ([1, 2], "ranks 1, 2 do not respond")


def test_where_nobody_is_behind_all_are_told_of() -> None:
    second = [pulse(n, beat=2, waiting=True) for n in range(2)]
    blamed, sentence = judged([pulse(0), pulse(1)], second, 2)
    assert blamed == [0, 1] and sentence.endswith("no rank is behind the others, all are inside a collective")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def walked(clock: Clock, dog: Watchdog, steps: int, seconds: float) -> None:
    for step in range(steps):
        dog.enter(DATA, step)
        clock.now += seconds / 2
        dog.enter(COMPUTE)
        dog.enter(STEP)
        clock.now += seconds / 2
        with dog.phase(EVALUATE):
            clock.now += 1000.0
    dog.enter(DATA, steps)


def test_the_limit_follows_the_median_step_without_what_happens_aside(tmp_path: Path) -> None:
    clock = Clock()
    limits = Limits(factor=10, floor=30, start=500, evaluate=77, checkpoint=88)
    dog = Watchdog(tmp_path, 0, 1, limits, clock=clock)
    assert dog.limit(DATA) == 500  # the first steps compile and fill caches
    walked(clock, dog, 5, 2.0)
    assert [dog.limit(phase) for phase in (DATA, EVALUATE, CHECKPOINT)] == [30, 77, 88]
    walked(clock, dog, 20, 6.0)
    assert dog.limit(STEP) == pytest.approx(60)
    assert dog.position == (DATA, 20)


def test_a_stall_dumps_the_stacks_says_who_and_ends_with_the_code_of_a_restart(tmp_path: Path) -> None:
    said: list[str] = []
    codes: list[int] = []
    dog = Watchdog(
        tmp_path, 0, 1, Limits(floor=0.3, start=0.3), log=said.append, end=lambda code: (codes.append(code), dog._stop.set())
    )
    dog.enter(DATA, 7)
    dog.start()
    end = time.monotonic() + 900
    while not codes and time.monotonic() < end:
        time.sleep(0.02)
    dog.stop()
    assert codes == [RESTART]
    assert len(said) == 1 and re.match(r"error: rank 0 has been in data at step 7 for \d+ s", said[0])
    assert "test_a_stall_dumps" in dog.stacks.read_text()
    told = json.loads((tmp_path / "pulse" / "rank-0.json").read_text())
    assert told["phase"] == DATA and told["stalled"] and told["host"] == socket.gethostname()


def test_what_ends_in_time_is_left_alone(tmp_path: Path) -> None:
    codes: list[int] = []
    now = [0.0]
    dog = Watchdog(tmp_path, 0, 1, Limits(floor=1.0, start=1.0), end=codes.append, clock=lambda: now[0])
    dog.start()
    for step in range(8):
        dog.enter(DATA, step)
        now[0] += 0.9
        beats, end = dog.pulses().get(0), deadline()
        while dog.pulses().get(0) == beats:  # it has looked at this phase
            assert time.monotonic() < end
            time.sleep(0.01)
    dog.stop()
    assert not codes and not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_python_stuck_in_c_is_ended_from_outside_of_python(tmp_path: Path) -> None:
    code = (
        "import ctypes, sys, time; from pathlib import Path; from pipeline.runtime import watchdog as w\n"
        "dog = w.Watchdog(Path(sys.argv[1]), 0, 1, w.Limits(floor=0.2, start=0.2)); w.BACKSTOP = 0.5\n"
        "dog.start(); time.sleep(0.12)\n"
        "ctypes.PyDLL(None).sleep(3600)"  # holds the interpreter's lock
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=LONG, check=False, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Timeout" in (tmp_path / "stacks-rank-0.txt").read_text()


def test_a_rank_has_a_heartbeat_from_the_beginning(tmp_path: Path) -> None:
    """A rank that is killed in its first seconds is found by its process number."""
    dog = Watchdog(tmp_path, 0, 1, Limits(floor=3600.0))
    dog.start()
    first = dog.pulses()
    dog.stop()
    assert first[0].pid == os.getpid() and first[0].beat == 1
