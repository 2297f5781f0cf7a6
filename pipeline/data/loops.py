"""Lets the worker processes of a plain DataLoader agree on where each of its loops begins.

A DataLoader starts new workers for every loop, each with a copy of the data set as it was in the parent process, which does not
hear how far they came. What the loops of one data set have in common is therefore in a small anonymous file of the parent:
workers of one loop find the same start there, and those of the next loop the end of the epoch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

Origin = tuple[int, int, int]


class Loops:
    """The loops over one data set. Copies in other processes, forked or unpickled, share the file."""

    def __init__(self) -> None:
        self._make()

    def __reduce__(self) -> tuple[Callable[..., Loops], tuple[int, int]]:
        return _attached, (self._pid, self._file)

    def _make(self) -> None:
        self._pid, self._file = os.getpid(), os.memfd_create("fovea-loops")
        weakref.finalize(self, _close, self._pid, self._file)

    def move(self, origin: Origin) -> None:
        """Lets the next loop start where the parent says, also in workers that are kept."""
        with self._locked() as table:
            table.clear()
            table.update(origin=origin, next=origin[1], loop=None, workers=[])

    def start(
        self, origin: Origin, loop: int, worker: int, end: Callable[[int], int], last: int | None = None
    ) -> tuple[Origin, int]:
        """Returns where a loop starts; called once by each of its workers.

        Args:
            origin: how often the parent has set the position of the data set, that position, and the number of ranks that share
                the step which it lies within (else 0), as this worker knows them.
            loop: the same for all workers of a loop, and most likely another for the next: the seed of the DataLoader.
            worker: number of this worker.
            end: returns the position after the epoch of a position.
            last: where the last loop of this worker ended, if it is kept.

        Returns:
            The origin that is valid now, and the start.
        """
        with self._locked() as table:
            known = table.get("origin")
            if known is None or known[0] < origin[0] or (known[0] == origin[0] and known[1] != origin[1]):
                table.clear()
                table.update(origin=origin, next=origin[1], loop=None, workers=[])
                last = None
            elif known[0] > origin[0]:
                origin, last = (known[0], known[1], known[2]), None
            if last is not None:
                table.update(next=max(table["next"], end(last)))
                return origin, last
            if table["loop"] != loop or worker in table["workers"]:
                table.update(loop=loop, workers=[], start=table["next"], next=end(table["next"]))
            table["workers"].append(worker)
            return origin, int(table["start"])

    def restored(self, origin: Origin, loop: int, worker: int, start: int, end: int) -> None:
        """Records the loop of a worker whose position was restored, so that the next loop starts at its end."""
        with self._locked() as table:
            same = (table.get("origin"), table.get("loop")) == (list(origin), loop)
            workers = [*(table["workers"] if same else []), worker]
            table.update(origin=origin, loop=loop, workers=workers, start=start, next=end)

    def next(self, origin: Origin) -> int | None:
        """Returns where the next loop starts; ``None`` if no worker has read from the position of the origin."""
        with self._locked() as table:
            used = table.get("origin") == list(origin) and table.get("loop") is not None
            return int(table["next"]) if used else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        descriptor = self._file if self._pid == os.getpid() else os.open(f"/proc/{self._pid}/fd/{self._file}", os.O_RDWR)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            try:
                table = json.loads(os.pread(descriptor, 1 << 20, 0) or b"{}")
                yield table
                data = json.dumps(table).encode()
                os.pwrite(descriptor, data, 0)
                os.ftruncate(descriptor, len(data))
            finally:
                fcntl.lockf(descriptor, fcntl.LOCK_UN)
        finally:
            if descriptor != self._file or self._pid != os.getpid():
                os.close(descriptor)


def _attached(pid: int, file: int) -> Loops:
    """Attaches to the file of a parent process; a copy in the same process, or of a process that has ended, gets its own."""
    loops = Loops.__new__(Loops)
    if pid == os.getpid() or not os.path.exists(f"/proc/{pid}/fd/{file}"):
        loops._make()
    else:
        loops._pid, loops._file = pid, file
    return loops


def _close(pid: int, file: int) -> None:
    if pid == os.getpid():
        with contextlib.suppress(OSError):
            os.close(file)
