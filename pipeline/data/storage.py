"""The only place that touches the bytes of shards.

Everything above asks four questions: which shards does a pattern name, how big is one, which version of it lies there, and
what stands between two of its bytes. Local files answer them today.
"""

from __future__ import annotations

import glob
import os
import re
import stat as modes
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from pipeline.errors import DataError

_OPEN_FILES = 64
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):(//)?")


@dataclass(frozen=True)
class ObjectStat:
    """What storage knows of a shard without opening it.

    Attributes:
        url: as it was asked for.
        size: bytes.
        tag: changes whenever the content may have changed (local files: modification time in nanoseconds).
    """

    url: str
    size: int
    tag: str


def expand(patterns: str | Sequence[str]) -> list[str]:
    """The shards that one or several patterns name, in order.

    A pattern is a path, a brace range (``train-{00000..00009}.tar``), a glob (``train-*.tar``) or a directory (all its
    ``*.tar``). Globs and directories are sorted by name; the rest keeps the order given.

    Raises:
        DataError: no shard matches, one is missing, or one is named twice.
    """
    wanted = [str(patterns)] if isinstance(patterns, (str, os.PathLike)) else [str(pattern) for pattern in patterns]
    if not any(pattern.strip() for pattern in wanted):
        raise DataError("no shard pattern is given", mend="Name shards such as 'data/train-{00000..00009}.tar'.")
    shards = [shard for pattern in wanted for shard in _expand_one(pattern)]
    missing = [shard for shard in shards if not os.path.isfile(local_path(shard))]
    if missing:
        more = f" and {len(missing) - 1} more of {len(shards)}" if len(missing) > 1 else ""
        raise DataError(f"{_kind(missing[0])}{more}", where=missing[0], mend="Check the path and the range of the pattern.")
    seen: dict[str, str] = {}
    for shard in shards:
        real = os.path.realpath(local_path(shard))
        if real in seen:
            raise DataError(f"the same shard is named twice (also as {seen[real]})", where=shard, mend="Name each shard once.")
        seen[real] = shard
    return shards


def local_path(url: str) -> str:
    """The path of a local file or of a ``file://`` URL.

    Raises:
        DataError: any other scheme.
    """
    match = _SCHEME.match(url)
    if match is None:
        return url
    if match[1].lower() == "file" and match[2]:
        return url[len(match[0]) :]
    if match[2]:
        raise DataError(
            f"object storage is not built yet (scheme {match[1]!r})",
            where=url,
            mend="Copy the shards to a disk and name that path.",
        )
    return url


def absolute(url: str) -> str:
    """The same shard by a name that holds in any working directory.

    Raises:
        DataError: a scheme that is not built yet.
    """
    return os.path.abspath(local_path(url))


def stat(url: str) -> ObjectStat:
    """Size and version of a shard.

    Raises:
        DataError: it is not there, or is no file.
    """
    path = local_path(url)
    try:
        info = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=url, mend="Check the path and its permissions.") from error
    if not modes.S_ISREG(info.st_mode):
        raise DataError(_kind(url), where=url, mend="Name a tar file.")
    return ObjectStat(url, info.st_size, str(info.st_mtime_ns))


def read(url: str, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset`` on. Safe to call from several threads.

    Raises:
        DataError: the file cannot be opened, or ends before ``offset + length``.
    """
    if length <= 0:
        return b""
    try:
        data = _FILES.get(local_path(url)).read(offset, length)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=url, mend="Check the path and its permissions.") from error
    if len(data) != length:
        raise DataError(
            f"ends at byte {offset + len(data)}, {length - len(data)} bytes short",
            where=url,
            mend="The shard was cut or replaced: copy it again and rebuild the index.",
        )
    return data


def forget(url: str | None = None) -> None:
    """Closes the descriptor kept for a shard, or all of them; the next read opens anew."""
    _FILES.forget(None if url is None else local_path(url))


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name in the same directory, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _File:
    """An open descriptor that closes when nobody holds it any more, so that eviction cannot pull it from under a reader."""

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

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class _Files:
    """The descriptors used last."""

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

    def forget(self, path: str | None) -> None:
        with self._lock:
            if path is None:
                self._files.clear()
            else:
                self._files.pop(path, None)


_FILES = _Files(_OPEN_FILES)


def _expand_one(pattern: str) -> list[str]:
    if pattern.startswith("~"):
        pattern = os.path.expanduser(pattern)
    local_path(pattern.split("{", 1)[0])
    try:
        plain = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError("braces do not match", where=pattern, mend="Write ranges as {00000..00009}.") from error
    shards: list[str] = []
    for one in plain:
        path = local_path(one)
        if os.path.isdir(path):
            found = sorted(str(file) for file in Path(path).glob("*.tar") if file.is_file())
            if not found:
                raise DataError(
                    "no shard matches: the directory holds no *.tar", where=one, mend="Point to a directory of tar files."
                )
        elif glob.has_magic(path) and not os.path.exists(path):
            found = sorted(glob.glob(path, recursive=True))
            if not found:
                raise DataError("no shard matches", where=one, mend="Check the pattern and the directory.")
        else:
            found = [one]
        shards += found
    if not shards:
        raise DataError("no shard matches", where=pattern, mend="Check the pattern; a range counts upwards.")
    return shards


def _kind(url: str) -> str:
    path = local_path(url)
    if os.path.isdir(path):
        return "is a directory, not a shard"
    return "is no regular file" if os.path.exists(path) else "shard does not exist"
