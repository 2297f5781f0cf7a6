"""Lets the worker processes of a plain DataLoader agree on where each of its loops begins.

A DataLoader starts new workers for every loop, each with a copy of the data set as it was in the parent process, which does not
hear how far they came. What the loops of one data set have in common is therefore in a small anonymous file of the parent:
workers of one loop find the same start there, and those of the next loop the end of the epoch.

A process that inherits a data set (a rank that ``torch.multiprocessing`` starts) has loops of its own. It cannot have a file of
its own, since nothing runs between its start and that of its workers: the file has an entry for each process that starts workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import get_worker_info

Origin = tuple[int, int, int]


_NAME = "fovea-loops"
_MOST_BYTES = 1 << 20


class Loops:
    """The loops over one data set. Copies in other processes, forked or unpickled, share the file.

    Methods refer to the loops of this process, or in a worker of a DataLoader to those of the process that started it.
    """

    def __init__(self) -> None:
        self._own(os.memfd_create(_NAME))

    def __reduce__(self) -> tuple[Callable[..., Loops], tuple[int, int]]:
        return _attached, (os.getpid(), self._file)  # a forked process has the file under the same number

    def _own(self, file: int) -> None:
        self._pid, self._file = os.getpid(), file
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
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            tables = json.loads(os.pread(self._file, _MOST_BYTES, 0) or b"{}")
            yield tables.setdefault(_parent() if get_worker_info() is not None else _process(os.getpid()), {})
            data = json.dumps(tables).encode()
            os.pwrite(self._file, data, 0)
            os.ftruncate(self._file, len(data))
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


def _attached(pid: int, file: int) -> Loops:
    """Attaches to the file of another process; a copy in the same process, or of a process that has ended, gets its own."""
    loops = Loops.__new__(Loops)
    path = f"/proc/{pid}/fd/{file}"
    try:
        shared = pid != os.getpid() and os.readlink(path).startswith(f"/memfd:{_NAME}")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC) if shared else os.memfd_create(_NAME)
    except OSError:
        descriptor = os.memfd_create(_NAME)
    loops._own(descriptor)
    return loops


def _parent() -> str:
    parent = multiprocessing.parent_process()  # not getppid(), which may be that of the fork server
    return _process(os.getppid() if parent is None or parent.pid is None else parent.pid)


def _process(pid: int) -> str:
    """Returns a process with its start time, since the number of one that has ended may be given again."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return f"{pid} {file.read().rpartition(b')')[2].split()[19].decode()}"
    except OSError:
        return str(pid)


def _close(pid: int, file: int) -> None:
    if pid == os.getpid():
        with contextlib.suppress(OSError):
            os.close(file)
