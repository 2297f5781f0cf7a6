"""Detects hangs: a thread in each rank tracks the rank's phase and ends the attempt when the phase exceeds its time limit.

Each rank writes a heartbeat (*pulse*) of a few hundred bytes to ``<run>/logs/attempt-…/pulse/rank-<n>.json`` every second or two.
Other ranks read these files without a collective; this distinguishes a rank that hangs from one that waits for it. All ranks
enter the same phases in the same order, so the rank that has entered the fewest is behind.

After a hang every rank writes the stack traces of all its threads to ``stacks-rank-<n>.txt`` beside the pulse directory, the rank
at fault reports it in one line, and all ranks exit with :data:`RESTART`, which a launcher may treat as "restart".
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pipeline.runtime import failure_claim as claims

BACKSTOP = 60.0  # seconds beyond a limit after which a process whose Python threads no longer run is ended
RESTART = 75  # exit code of failures that a new attempt may fix (EX_TEMPFAIL of sysexits.h)
START, DATA, COMPUTE, STEP, TEACHER, LOG = "start", "data", "forward and backward", "step", "teacher", "log"
EVALUATE, CHECKPOINT, END = "evaluation", "checkpoint", "end"
_LOOP = (DATA, COMPUTE, STEP, TEACHER, LOG)
_WAITING_ROOMS = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}")


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds.

    Attributes:
        factor: limit of a phase of a step, as a multiple of the median step time,
        floor: but at least this many seconds.
        start, evaluate, checkpoint: limits of the other phases; the first three steps count as start.
    """

    factor: float = 20.0
    floor: float = 300.0
    start: float = 3600.0
    evaluate: float = 7200.0
    checkpoint: float = 3600.0


@dataclass(frozen=True)
class Pulse:
    """The last heartbeat of a rank.

    Attributes:
        rank: the rank.
        beat: counter of heartbeats; if it stops increasing, the rank is gone or frozen.
        entered: number of phases entered so far.
        phase, step, seconds: current phase and step, and the time in that phase.
        waiting: whether the main thread is inside a collective.
        stalled: whether the rank has detected a hang.
        host, pid: host name and process ID.
    """

    rank: int
    beat: int
    entered: int
    phase: str
    step: int
    seconds: float
    waiting: bool
    stalled: bool
    host: str
    pid: int

    @property
    def where(self) -> str:
        """Describes the rank's phase and step."""
        return f"in {self.phase} at step {self.step} for {self.seconds:.0f} s"


class Watchdog:
    """Monitors the main thread of one rank.

    Args:
        folder: the attempt's log directory.
        rank, size: rank and world size.
        limits: time limits.
        log: receives the one line about a hang; by default it goes to stderr.
        end: ends the process with an exit code.
        clock: monotonic clock, seconds.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        limits: Limits | None = None,
        *,
        log: Callable[[str], None] | None = None,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.rank, self.size, self.limits = folder, rank, size, limits or Limits()
        self._log, self._end, self._clock = log or _to_stderr, end, clock
        self.interval = min(max(self.limits.floor / 20, 0.05), 2.0)
        self._now = (0, START, 0, clock())
        self._step, self._recent, self._seen = 0.0, deque[float](maxlen=101), 0
        self._beat, self._waits = 0, False
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._stacks: IO[str] | None = None

    @property
    def stacks(self) -> Path:
        """File for this rank's stack traces and for tracebacks of errors that other ranks caused."""
        return self.folder / f"stacks-rank-{self.rank}.txt"

    @property
    def position(self) -> tuple[str, int]:
        """Current phase and step."""
        return self._now[1], self._now[2]

    def start(self) -> None:
        """Starts the thread."""
        (self.folder / "pulse").mkdir(parents=True, exist_ok=True)
        self._stacks = self.stacks.open("a")
        self._pulse(stalled=False)  # a rank that is killed before its first regular heartbeat can be identified by its process
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)
            faulthandler.cancel_dump_traceback_later()
            self._thread = None

    def enter(self, phase: str, step: int | None = None) -> None:
        """Marks the start of a phase in the main thread; takes less than a microsecond."""
        entered, before, at, since = self._now
        now = self._clock()
        if before in _LOOP:
            self._step += now - since
        if phase == DATA and self._step:
            self._recent.append(self._step)
            self._seen, self._step = self._seen + 1, 0.0
        self._now = (entered + 1, phase, at if step is None else step, now)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context manager of a nested phase; afterwards the outer phase continues."""
        before = self._now[1]
        self.enter(name)
        yield
        self.enter(before)

    def limit(self, phase: str) -> float:
        """Returns the current time limit of a phase, seconds."""
        if phase not in _LOOP:
            others = {EVALUATE: self.limits.evaluate, CHECKPOINT: self.limits.checkpoint}
            return others.get(phase, self.limits.start)
        if self._seen < 3:
            return max(self.limits.start, self.limits.floor)
        return max(self.limits.floor, self.limits.factor * statistics.median(tuple(self._recent)))

    def pulses(self) -> dict[int, Pulse]:
        """Returns the last heartbeats of all ranks that have one."""
        pulses = {}
        for rank in range(self.size):
            with contextlib.suppress(OSError, ValueError, TypeError):
                pulses[rank] = Pulse(**json.loads((self.folder / "pulse" / f"rank-{rank}.json").read_text()))
        return pulses

    def diagnose(self, *, waits: bool = False) -> tuple[list[int], str]:
        """Returns the ranks that the others wait for, and a sentence about them; reads the heartbeats twice, some beats apart.

        Args:
            waits: this rank's collective failed, so it counts as waiting.
        """
        self._waits = waits
        first = self.pulses()
        end = self._clock() + 4 * self.interval
        while self._clock() < end and not self._gone(first):
            self._pulse(stalled=True)
            self._stop.wait(self.interval)
        return find_hung_ranks(first, self.pulses(), self.size, self._gone(first), self.rank)

    def _gone(self, pulses: dict[int, Pulse]) -> list[int]:
        """Returns the ranks of this node whose process has ended."""
        here = socket.gethostname()
        return [p.rank for p in pulses.values() if p.host == here and not _lives(p.pid)]

    def _pulse(self, *, stalled: bool) -> None:
        entered, phase, step, since = self._now
        self._beat += 1
        pulse = Pulse(
            rank=self.rank,
            beat=self._beat,
            entered=entered,
            phase=phase,
            step=step,
            seconds=round(self._clock() - since, 1),
            waiting=self._waits or _in_collective(self._main),
            stalled=stalled,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        # The run directory may be unavailable for a while: the checkpoint handles that, and it is no reason to exit here.
        with contextlib.suppress(OSError):
            (self.folder / "pulse" / f"rank-{self.rank}.json").write_text(json.dumps(asdict(pulse)))

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            _, phase, _, since = self._now
            seconds, limit = self._clock() - since, self.limit(phase)
            # If the interpreter itself hangs, this thread does not run either; a timer outside of Python then ends the process.
            faulthandler.dump_traceback_later(limit + BACKSTOP + 20 * self.interval, exit=True, file=self._stacks or sys.stderr)
            self._pulse(stalled=seconds > limit)
            if seconds > limit or (seconds > limit / 2 and any(pulse.stalled for pulse in self.pulses().values())):
                self._stalled()

    def _stalled(self) -> None:
        entered, phase, step, _ = self._now
        self.dump(f"stall of rank {self.rank}, {phase} at step {step}")
        blamed, sentence = self.diagnose()
        if self._now[0] != entered or self._stop.is_set():
            self._log(f"rank {self.rank}: {phase} at step {step} took long, but has ended; continuing")
            return
        alive = [rank for rank in range(self.size) if rank not in blamed] or [0]
        if self.rank in blamed or not self._speaks(blamed):
            first = self.rank == min(blamed) if self.rank in blamed else self.rank == min(alive)
        else:
            first = False
        text = f"{sentence}. The stacks of all ranks are in {self.folder}; the attempt ends and the same command resumes."
        if first:
            own = {"rank": self.rank, "what": sentence, "code": RESTART, "step": step}
            own |= {"kind": "Stall", "retryable": True, "cause": "hang"}
            claims.claim(self.folder, own)
            self._log(f"error: {text}")
        else:
            self._stop.wait(1.0 + 4 * self.interval)  # let the rank that reports the hang exit first
            self._log(f"rank {self.rank} ends: {sentence}")
        self._end(RESTART)

    def _speaks(self, blamed: list[int]) -> bool:
        """Whether one of these ranks is able to report the hang itself."""
        return any(pulse.stalled for rank, pulse in self.pulses().items() if rank in blamed)

    def dump(self, title: str) -> None:
        """Writes the stack traces of all threads under a title."""
        with contextlib.suppress(OSError), self.stacks.open("a") as file:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def find_hung_ranks(
    first: dict[int, Pulse], second: dict[int, Pulse], size: int, gone: list[int], reporter: int
) -> tuple[list[int], str]:
    """Determines the ranks that the others wait for, from two readings of the heartbeats.

    Args:
        first, second: the heartbeats, some beats apart.
        size: world size.
        gone: ranks whose process is known to have ended.
        reporter: the calling rank, which is alive.

    Returns:
        The ranks at fault, all ranks if none can be identified, and a sentence.
    """
    silent_ranks = [
        rank
        for rank in range(size)
        if rank != reporter and (rank not in second or rank in gone or (rank in first and first[rank].beat == second[rank].beat))
    ]
    if silent_ranks:
        last_pulse = second.get(silent_ranks[0]) or first.get(silent_ranks[0])
        last_seen = f"; last heartbeat in {last_pulse.phase} at step {last_pulse.step}" if last_pulse else ""
        is_gone = ("has exited", "have exited") if silent_ranks[0] in gone else ("does not respond", "do not respond")
        return silent_ranks, f"{_ranks(silent_ranks)} {is_gone[len(silent_ranks) > 1]}{last_seen}"
    least = min(pulse.entered for pulse in second.values())
    behind = [pulse for pulse in second.values() if pulse.entered == least]
    working = [pulse for pulse in behind if not pulse.waiting]
    if working and len(working) < len(second):
        behind = working
    blamed = sorted(pulse.rank for pulse in behind)
    slowest = max(behind, key=lambda pulse: pulse.seconds)
    has = "has" if len(blamed) == 1 else "have"
    sentence = f"{_ranks(blamed)} {has} been {slowest.where}"
    others = [pulse for pulse in second.values() if pulse.rank not in blamed]
    if others:
        phases = " and ".join(sorted({pulse.phase for pulse in others}))
        sentence += f"; the others wait for {'it' if len(blamed) == 1 else 'them'} in {phases}"
    elif size > 1:
        sentence += "; no rank is behind the others" + (", all are inside a collective" if behind[0].waiting else "")
    return blamed, sentence


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (" …" if len(ranks) > 4 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def _in_collective(thread: int | None) -> bool:
    """Whether a thread is inside torch.distributed or DeepSpeed."""
    frame = sys._current_frames().get(thread or 0)
    innermost = True
    while frame is not None:
        file = frame.f_code.co_filename
        if _WAITING_ROOMS[0] in file or (innermost and _WAITING_ROOMS[1] in file):
            return True
        frame, innermost = frame.f_back, False
    return False


def _to_stderr(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
