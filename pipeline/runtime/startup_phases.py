"""Records where the start of a run spends its time, from the command to the first step: ``startup.json`` of each attempt.

The launcher hands what it has recorded to the ranks in an environment variable; the first rank adds its own marks and writes
them all once, after its first step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VARIABLE = "FOVEA_STARTUP"
FILE = "startup.json"
FIRST_STEP = "first step"  # ends the record
_MOST = 64  # marks that a launcher hands on
_LONG = 64  # characters of a mark's name


@dataclass(frozen=True)
class Mark:
    """The end of a phase.

    Attributes:
        process: ``launcher`` or ``rank``.
        name: what has just ended.
        seconds: since the command began.
        cpu: CPU seconds of the process since it began, in all threads, without those of its children.
    """

    process: str
    name: str
    seconds: float
    cpu: float


@dataclass
class StartupPhases:
    """Marks of one process, after those of the launcher that started it.

    Attributes:
        process: ``launcher`` or ``rank``.
        begun: when the command began, seconds since 1970.
        marks: what has ended so far.
        folder: where the record is written when it ends; ``None`` for nowhere.
        clock: seconds since 1970.
        cpu: CPU seconds of this process.
    """

    process: str = "rank"
    begun: float = field(default_factory=time.time)
    marks: list[Mark] = field(default_factory=list)
    folder: Path | None = None
    clock: Callable[[], float] = time.time
    cpu: Callable[[], float] = time.process_time
    _ended: bool = False

    @classmethod
    def of_rank(cls, environment: Mapping[str, str]) -> StartupPhases:
        """Marks of a rank: after its launcher's, if the environment names any; else since its process began."""
        born = process_begin()
        try:
            document = json.loads(environment[VARIABLE])
            begun = float(document["begun"])
            marks = [
                Mark(str(m["process"])[:_LONG], str(m["name"])[:_LONG], float(m["seconds"]), float(m["cpu"]))
                for m in document["marks"][:_MOST]
            ]
            usable = math.isfinite(begun) and begun <= born + 1.0  # a process's start is known to 10 ms
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
            usable = False
        if not usable:
            return cls("rank", born)
        marks.append(Mark("rank", "process", round(max(born - begun, 0.0), 3), 0.0))
        return cls("rank", begun, marks)

    def mark(self, name: str) -> None:
        """Record that a phase has ended. After the first step nothing is recorded any more."""
        if self._ended:
            return
        self.marks.append(Mark(self.process, name, round(self.clock() - self.begun, 3), round(self.cpu(), 3)))
        self._ended = name == FIRST_STEP
        if self._ended and self.folder is not None:
            self._write(self.folder)

    def variable(self) -> str:
        """The value of the variable for ranks that this process starts."""
        return json.dumps(self.document())

    def document(self) -> dict[str, Any]:
        """What is written."""
        return {"begun": round(self.begun, 3), "marks": [asdict(mark) for mark in self.marks]}

    def _write(self, folder: Path) -> None:
        """A disk that does not take the file does not end the run."""
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".{FILE}.{os.getpid()}"
            temporary.write_text(json.dumps(self.document(), indent=1))
            temporary.replace(folder / FILE)


def process_begin() -> float:
    """When this process was created, seconds since 1970, to about 10 ms; where the kernel does not say, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - max(up - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError):
        return time.time()
