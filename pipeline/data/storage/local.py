"""Reads shards from local disks through cached descriptors; writes files atomically."""

from __future__ import annotations

import contextlib
import os
import stat as modes
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.storage.names import ObjectStat, local_path
from pipeline.errors import DataError

_OPEN_FILES = 64


def stat(url: str) -> ObjectStat:
    """Returns size and version of a shard.

    Raises:
        DataError: it does not exist, or is not a file.
    """
    path = local_path(url)
    try:
        info = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=url, hint="Check the path and its permissions") from error
    if not modes.S_ISREG(info.st_mode):
        raise DataError(describe(url), where=url, hint="Name a tar file")
    return ObjectStat(url, info.st_size, str(info.st_mtime_ns))


def read(url: str, offset: int, length: int) -> bytes:
    """Reads ``length`` bytes at ``offset``. Thread-safe.

    Raises:
        DataError: the file cannot be opened, or ends before ``offset + length``.
    """
    if length <= 0:
        return b""
    try:
        data = _FILES.get(local_path(url)).read(offset, length)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=url, hint="Check the path and its permissions") from error
    if len(data) != length:
        raise DataError(
            f"ends at byte {offset + len(data)}, {length - len(data)} bytes short",
            where=url,
            hint="Copy the shard again and rebuild the index: it was truncated or replaced",
        )
    return data


def forget(url: str | None = None) -> None:
    """Closes the cached descriptor of a shard, or all of them; the next read opens the file again."""
    _FILES.forget(None if url is None else local_path(url))


def forget_deleted() -> None:
    """Closes descriptors of deleted files, so that their disk space is freed."""
    _FILES.forget_deleted()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives errors of an open file its path: a write to a full disk names none.

    Args:
        path: that a person knows.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name in the same directory, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _File:
    """A descriptor that closes with its last reference, so that eviction cannot close it during a read."""

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length > 0:
            part = os.pread(self._descriptor, length, offset)
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def deleted(self) -> bool:
        return os.fstat(self._descriptor).st_nlink == 0

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class _Files:
    """Cache of the most recently used descriptors."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()

    def get(self, path: str) -> _File:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _File(path)
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file

    def forget_deleted(self) -> None:
        with self._lock:
            for path in [path for path, file in self._files.items() if file.deleted]:
                del self._files[path]

    def forget(self, path: str | None) -> None:
        with self._lock:
            if path is None:
                self._files.clear()
            else:
                self._files.pop(path, None)


_FILES = _Files(_OPEN_FILES)


def describe(url: str) -> str:
    """Describes why a path is not a shard: missing, a directory, or something else."""
    path = local_path(url)
    if os.path.isdir(path):
        return "is a directory, not a shard"
    return "is not a regular file" if os.path.exists(path) else "shard does not exist"
