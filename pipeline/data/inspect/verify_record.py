"""What a verification has checked, recorded on disk, so that it can be interrupted, and divided among machines.

Each part of a data set has a file of its own in the index directory, with a line for each task that was completed. The
verification of everything reads the files of all parts, checks what is left, and removes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.runtime.locks import lock
from pipeline.untrusted import parse_json, printable

CHUNK = 128  # samples per task: what an interruption loses, and what is tried again after a crash
_LINE = 1 << 20  # maximum size of a line


@dataclass(frozen=True)
class Failure:
    """A sample that cannot be used although the index accepts it.

    Attributes:
        shard: number of the shard in the manifest.
        row: row among its accepted samples.
        reason: one of :data:`pipeline.data.inspect.verify.REASONS`.
    """

    shard: int
    row: int
    reason: str


@dataclass(frozen=True)
class Task:
    """Some samples of a shard: rows ``first`` to ``last``, without the last."""

    shard: int
    first: int
    last: int


class Record:
    """Completed tasks of one index; as a context manager it locks its file.

    Memory: about 100 bytes for each shard with a completed task, and for each failure.

    Args:
        folder: the index directory.
        fingerprint: of the data; records of other data are discarded.
        sizes: samples of each shard.
        part: number, from 1, and count of parts, whose tasks are recorded here; ``None`` for the verification of everything.

    Attributes:
        failures: of all completed tasks.
        checked: samples of all completed tasks.
    """

    def __init__(self, folder: Path, fingerprint: str, sizes: NDArray[np.int64], part: tuple[int, int] | None = None) -> None:
        name = "verify.jsonl" if part is None else f"verify-{part[0]:05d}-of-{part[1]:05d}.jsonl"
        self._folder, self._path, self._whole_set = folder, folder / name, part is None
        self._sizes = sizes
        self._header = json.dumps({"fingerprint": fingerprint, "chunk": CHUNK})
        self._done: dict[int, int] = {}  # by shard, a bit for each task
        self._files = ExitStack()
        self._file: IO[str] | None = None
        self.failures: list[Failure] = []
        self.checked = 0

    def __enter__(self) -> Record:
        with self._files:  # closed on errors
            self._file = self._open(self._path)
            if self._whole_set:
                for path in sorted(self._folder.glob("verify-*-of-*.jsonl")):
                    self._open(path)
            self._files = self._files.pop_all()
        return self

    def is_done(self, task: Task) -> bool:
        """Whether a task is completed."""
        return bool(self._done.get(task.shard, 0) >> task.first // CHUNK & 1)

    def add(self, task: Task, failures: tuple[Failure, ...]) -> None:
        """Records a completed task."""
        self._take(task, failures)
        entry = [task.shard, task.first, task.last, [[failure.row, failure.reason] for failure in failures]]
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def finish(self) -> None:
        """Removes the records of all parts; that of a part alone is kept."""
        if self._whole_set:
            for path in (self._path, *self._folder.glob("verify-*-of-*.jsonl")):
                path.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _take(self, task: Task, failures: tuple[Failure, ...]) -> None:
        if not self.is_done(task):
            self._done[task.shard] = self._done.get(task.shard, 0) | 1 << task.first // CHUNK
            self.checked += task.last - task.first
            self.failures += failures

    def _open(self, path: Path) -> IO[str]:
        """Locks and reads a file; what follows its last complete line, or does not come from this class, is cut off."""
        try:
            file = path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            what = f"cannot be written ({error.strerror})"
            raise DataError(what, where=str(path), hint="Give another --index") from error
        self._files.enter_context(file)
        try:
            lock(file.fileno(), path, wait=False)
        except BlockingIOError:
            raise DataError("another verification is running", where=str(path), hint="Wait for it, or stop it") from None
        file.seek(0)
        before = self._done.copy(), self.failures.copy(), self.checked
        good = 0
        try:
            for end, line in _lines(file):
                if good == 0:
                    if line.rstrip("\n") != self._header:
                        break
                else:
                    task, failures = _entry(line)
                    if task.shard >= len(self._sizes) or task.last > self._sizes[task.shard]:
                        raise ValueError("there are no such samples")
                    self._take(task, failures)
                good = end
        except (ValueError, TypeError):  # not written by this class: verify everything again
            (self._done, self.failures, self.checked), good = before, 0
        file.seek(good)
        if file.read(1):
            file.truncate(good)
        file.seek(0, 2)
        if good == 0:
            file.write(self._header + "\n")
            file.flush()
        return file


def _lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    """Complete lines, each with the position after it."""
    while line := file.readline(_LINE):
        if not line.endswith("\n"):
            if len(line) == _LINE:
                raise ValueError("too long a line")
            return
        yield file.tell(), line


def _entry(line: str) -> tuple[Task, tuple[Failure, ...]]:
    shard, first, last, failures = parse_json(line)
    if not all(type(number) is int and number >= 0 for number in (shard, first, last)) or first % CHUNK or first >= last:
        raise TypeError("a task has three numbers")
    return Task(shard, first, last), tuple(Failure(shard, int(row), printable(str(reason))) for row, reason in failures)
