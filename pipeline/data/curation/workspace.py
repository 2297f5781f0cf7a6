"""Intermediate results of curation on disk, so that an interrupted command continues and several machines share the work."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import storage
from pipeline.data.index.arrays import read_arrays
from pipeline.errors import DataError
from pipeline.runtime.locks import lock
from pipeline.untrusted import printable, read_json

_KEY, _LOCK, _USERS = "work.json", ".lock", ".users"


class Workspace:
    """A folder of results, each complete or absent; a context manager that keeps other commands out.

    Args:
        folder: it is created if it does not exist.
        key: what the results depend on, JSON values; a folder of other results is refused.
        shared: let other processes that share it work here too: parts of the same work.

    Raises:
        DataError: it holds other results, another process works there, or it cannot be written.
    """

    def __init__(self, folder: Path, key: dict[str, Any], *, shared: bool = False) -> None:
        self.folder = folder
        where, document = printable(str(folder)), json.loads(json.dumps(key))
        try:
            self._users = _enter(folder, shared)
            try:
                with self.locked() if shared else contextlib.nullcontext():
                    self._check(document, where, shared)
            except BaseException:
                self._users.close()
                raise
        except OSError as error:
            raise cannot_write(folder, error) from error

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._users.close()

    def _check(self, document: Any, where: str, shared: bool) -> None:
        path = self.folder / _KEY
        if not path.exists():
            if _results(self.folder):
                raise DataError("the folder is not empty", where=where, hint="Choose another --work, or remove it")
        elif (known := read_json(path)) == document:
            return
        elif shared or _results(self.folder):  # else the settings of a command that was refused, such as too many clusters
            names = sorted(name for name in document if not isinstance(known, dict) or known.get(name) != document[name])
            raise DataError(
                f"the folder has intermediate results of other data or settings ({', '.join(names)})",
                where=where,
                hint="Remove it, or choose another --work",
            )
        storage.write_atomically(path, json.dumps(document, indent=1).encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lets one process at a time work here."""
        with (self.folder / _LOCK).open("a") as file:
            lock(file.fileno(), file.name)
            yield

    def arrays(self, name: str, types: dict[str, Any], make: Callable[[], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """Returns one-dimensional arrays of a file, which is made if it is missing or damaged.

        Args:
            name: of the file, without its ending.
            types: of the arrays, by name.
            make: computes them.
        """
        path = self.folder / f"{name}.npz"
        try:
            return read_arrays(path, types)
        except (OSError, ValueError):
            pass
        arrays = {key: np.ascontiguousarray(value, dtype=types[key]).reshape(-1) for key, value in make().items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise cannot_write(path, error) from error
        return arrays

    def remove(self, name: str) -> None:
        """Removes a file of arrays that is not needed any more."""
        (self.folder / f"{name}.npz").unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Whether a file of arrays is there."""
        return (self.folder / f"{name}.npz").exists()


def remove(folder: Path) -> None:
    """Removes a folder of intermediate results, unless another process works there."""
    with contextlib.suppress(OSError), (folder / _USERS).open("a") as file:
        lock(file.fileno(), file.name, wait=False)
        shutil.rmtree(folder, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> DataError:
    """Returns the message about an intermediate result that cannot be written."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return DataError(
        f"an intermediate result cannot be written ({reason})",
        where=printable(str(path)),
        hint="Free space there, or choose another --work",
    )


def _enter(folder: Path, shared: bool) -> IO[str]:
    """Opens the file that is locked while a process works in the folder; removes what killed processes left, if there is none."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if shared:  # one part after another, since the first one shuts the others out while it looks
                first = stack.enter_context((folder / _LOCK).open("a"))
                lock(first.fileno(), first.name)
            file = (folder / _USERS).open("a")
            try:
                alone = _try(file, shared=False)
                if not alone and not (shared and _try(file, shared=True)):
                    raise DataError(
                        "another process works in this folder",
                        where=printable(str(folder)),
                        hint="Wait for it, or choose another --work",
                    )
                if not _is_at(file, folder / _USERS):  # another process removed the folder in the meantime
                    file.close()
                    continue
                if alone == "held":
                    for path in folder.rglob(".*.tmp"):
                        path.unlink(missing_ok=True)
                    if shared:
                        lock(file.fileno(), file.name, shared=True)
            except BaseException:
                file.close()
                raise
            return file


def _try(file: IO[str], *, shared: bool) -> str:
    """Locks a file; returns ``held``, ``unknown`` if the file system has no locks, or nothing if another process has it."""
    try:
        return "held" if lock(file.fileno(), file.name, wait=False, shared=shared) else "unknown"
    except BlockingIOError:
        return ""


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _results(folder: Path) -> bool:
    """Whether a folder has anything but locks and settings."""
    return any(path.name not in (_KEY, _LOCK, _USERS) and not path.name.startswith(f".{_KEY}.") for path in folder.iterdir())


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
