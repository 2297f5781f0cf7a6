"""Reads what the stand-in recorded, and names the Python line of each host wait and blocking copy. Used inside the process."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pipeline

_ROOT = Path(str(pipeline.__file__)).resolve().parents[1]  # of the checkout that is measured
_OURS = (str(_ROOT / "pipeline") + os.sep, str(_ROOT / "launch") + os.sep)
_THIN = ("torch", "deepspeed/accelerator")
_HERE = str(Path(__file__).resolve().parent) + os.sep


@dataclass(frozen=True)
class Call:
    """Calls of one name on one thread, device and stream.

    Attributes:
        phase: phase of the step, as the trainer enters them.
        kind: ``kernel``, ``gemm``, ``copy``, ``fill``, ``wait``, ``order`` (events), ``allocation``, ``select``, ``unmodelled``.
        thread: name of the Python thread; ``native`` for threads of libraries, such as autograd's.
        device: the device on which it happened.
        stream: ``default``, or a number.
        calls, bytes: how often, and how much was moved or allocated.
        name: of the kernel or call.
    """

    phase: str
    kind: str
    thread: str
    device: int
    stream: str
    calls: int
    bytes: int
    name: str


@dataclass(frozen=True)
class Block:
    """Host waits, or copies that may make the host wait, of one place.

    Attributes:
        phase, thread: as in :class:`Call`.
        what: which wait or copy.
        where: file and function of the project that caused it, and behind ``<`` the library's that called it, if another.
        line: file and line of both.
        calls: how often.
    """

    phase: str
    thread: str
    what: str
    where: str
    line: str
    calls: int


@dataclass(frozen=True)
class Collective:
    """Calls of one collective.

    Attributes:
        phase: as in :class:`Call`.
        name: of the function of ``torch.distributed``.
        dtype, device: of its tensor.
        calls, bytes: how often, and the bytes of the tensor that this rank holds.
    """

    phase: str
    name: str
    dtype: str
    device: str
    calls: int
    bytes: int


@dataclass
class Record:
    """What happened between two marks, in the order of the phases."""

    calls: list[Call] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Record:
        return cls(
            [Call(**row) for row in document["calls"]],
            [Block(**row) for row in document["blocks"]],
            [Collective(**row) for row in document["collectives"]],
            document["seconds"],
            document["functions"],
        )


class Recorder:
    """Records in phases; one per process.

    Args:
        aside: names of threads whose CPU time is not counted.
    """

    def __init__(self, aside: tuple[str, ...] = ("fovea-data",)) -> None:
        self._library = ctypes.CDLL(os.environ["STANDIN_LIBRARY"])
        self._library.standin_rows.restype = ctypes.c_char_p
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_size_t)(self._blocked)
        self._library.standin_callback(self._callback)
        self._threads = {threading.main_thread().native_id: "main"}
        self._aside = aside
        self._blocks: Counter[tuple[str, str, str, str, str]] = Counter()
        self._collectives: dict[tuple[str, str, str, str], list[int]] = {}
        self._phase, self._begun = "", 0.0
        self._record = Record()
        self._watch_threads()

    def forked(self) -> None:
        """Goes on in a fork, whose main thread has a number of its own; the library may still have the old one."""
        self._threads[threading.get_native_id()] = "main"
        self._begun = self._cpu_seconds()

    def count(self, name: str) -> None:
        """Counts a call of a Python function, under a name."""
        self._record.functions[name] = self._record.functions.get(name, 0) + 1

    def collective(self, name: str, dtype: str, device: str, size: int) -> None:
        """Counts a collective."""
        entry = self._collectives.setdefault((self._phase, name, dtype, device), [0, 0])
        entry[0] += 1
        entry[1] += size

    def enter(self, phase: str) -> None:
        """Begins a phase and ends the one before it."""
        now, record = self._cpu_seconds(), self._record
        for line in self._library.standin_rows().decode().splitlines():
            thread, kind, device, stream, calls, size, name = line.split("\t", 6)
            place = "default" if stream in ("0", "1", "2") else stream
            owner = self._threads.get(int(thread), "native")
            record.calls.append(Call(self._phase, kind, owner, int(device), place, int(calls), int(size), name))
        self._library.standin_reset()
        record.seconds[self._phase] = record.seconds.get(self._phase, 0.0) + now - self._begun
        self._phase, self._begun = phase, self._cpu_seconds()

    def mark(self) -> Record:
        """What happened since the last mark."""
        self.enter("")
        record, self._record = self._record, Record()
        record.blocks = [Block(*key, calls) for key, calls in self._blocks.items()]
        record.collectives = [Collective(*key, *entry) for key, entry in self._collectives.items()]
        self._blocks, self._collectives = Counter(), {}
        return record

    def _blocked(self, name: bytes, _: int) -> None:
        thread = threading.get_native_id()
        owner = self._threads.get(thread, "native")
        frames = list(_stack(sys._getframe()))
        if not frames:  # autograd's own thread: the line is the one that called backward
            frames = list(_stack(sys._current_frames().get(threading.main_thread().ident)))
        ours = next((frame for frame in frames if frame.f_code.co_filename.startswith(_OURS)), None)
        inner = next((frame for frame in frames if not _thin(frame)), None)
        places = [frame for frame in dict.fromkeys((ours, inner)) if frame is not None] or frames[:1]
        where = " < ".join(f"{_short(frame)}:{frame.f_code.co_qualname}" for frame in places)
        line = " < ".join(f"{_short(frame)}:{frame.f_lineno}" for frame in places)
        self._blocks[self._phase, owner, name.decode(), where, line] += 1

    def _cpu_seconds(self) -> float:
        """CPU seconds of this process without the threads to leave out."""
        aside = [thread for thread in threading.enumerate() if thread.name in self._aside and thread.ident is not None]
        others = 0.0
        for thread in aside:
            try:
                others += time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
            except OSError:  # it has just ended
                continue
        return time.process_time() - others

    def _watch_threads(self) -> None:
        """Remembers the names of threads, also of those that end."""
        original, names = threading.Thread.start, self._threads

        def start(thread: threading.Thread) -> None:
            original(thread)
            names[thread.native_id] = thread.name

        for thread in threading.enumerate():
            names.setdefault(thread.native_id, thread.name)
        threading.Thread.start = start  # type: ignore[method-assign]


def _stack(frame: FrameType | None) -> Any:
    """Frames from the innermost outwards, without those of the recorder."""
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_HERE):
            yield frame
        frame = frame.f_back


def _thin(frame: FrameType) -> bool:
    """Whether a frame only passes a call on: torch, and DeepSpeed's wrapper of ``torch.cuda``."""
    return any(f"{os.sep}site-packages{os.sep}{part}{os.sep}" in frame.f_code.co_filename for part in _THIN)


def _short(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    return name.rpartition("site-packages" + os.sep)[2].removeprefix(str(_ROOT) + os.sep)
