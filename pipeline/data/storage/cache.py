"""Cache of whole shards on a node's disk, shared by its ranks and jobs.

A shard is downloaded to ``.<name>.part``, locked by the downloading process; the kernel releases the lock if that process dies.
The file is then synced and renamed, so every file under its final name is complete. Readers keep descriptors, so a shard may be
evicted while it is read. The shards that a running job is going to read are listed in ``.needs-…``, locked while the job lives;
everything else may be evicted, least recently used first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pipeline.data.storage.names import ObjectStat, base_name
from pipeline.errors import DataError
from pipeline.runtime.locks import lock
from pipeline.untrusted import read_json

_FORGOTTEN = 86400.0  # seconds after which a file counts as abandoned, where no lock shows whether it is in use
_log = logging.getLogger(__name__)
Fetch = Callable[[ObjectStat, int], None]


class CacheFull(Exception):
    """There is no room for a shard without evicting what a running job needs."""


class ShardCache:
    """Directory of cached shards.

    Args:
        folder: on a disk of this node; created if missing.
        limit: maximum size of the cache, bytes; ``None`` for four fifths of the space that is free or cached now.
        floor: disk space to keep free, bytes.
        shared: the user named the directory, so other users may write to it, and their shards are used for training. Otherwise it
            must belong to this user alone: mode 0700, not a link; files of other users are neither read nor written.

    Raises:
        DataError: the directory is not writable, or belongs to another user.
    """

    def __init__(self, folder: Path, *, limit: int | None = None, floor: int = 0, shared: bool = False) -> None:
        self.folder, self._shared = folder, shared
        self._mode = 0o666 if shared else 0o600
        try:
            folder.mkdir(mode=0o777 if shared else 0o700, parents=True, exist_ok=True)
            self._check_folder()
            with self._alone():
                self._sweep()
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise DataError("must be a file, not a link", where=str(folder), hint="Remove the link") from error
            raise DataError(
                f"cannot be used as the shard cache ({error.strerror})",
                where=str(folder),
                hint="Set data.storage.cache to a folder on a local disk",
            ) from error
        self.floor = floor
        held = sum(size for _, size, _ in self._files())
        self.limit = (shutil.disk_usage(folder).free + held) * 4 // 5 if limit is None else limit
        self._needs: int | None = None

    def path(self, about: ObjectStat) -> Path:
        """Returns the path of this version of a shard."""
        return self.folder / self.name(about)

    @staticmethod
    def name(about: ObjectStat) -> str:
        """Returns the file name of this version of a shard."""
        text = f"{about.url}\0{about.size}\0{about.tag}".encode("utf-8", "surrogateescape")
        return f"{hashlib.blake2b(text, digest_size=10).hexdigest()}-{base_name(about.url)[-80:]}"

    def has(self, about: ObjectStat) -> bool:
        """Whether the complete shard is cached."""
        return self._is_complete(self.path(about), about.size)

    def kept(self, about: ObjectStat) -> Path | None:
        """Returns the path of a complete cached shard; ``None`` if it is not cached."""
        path = self.path(about)
        return path if self._is_complete(path, about.size) else None

    def _is_complete(self, path: Path, size: int) -> bool:
        """Whether a regular file of that size exists, owned by this user unless the cache is shared. Removes any other file."""
        try:
            about = path.lstat()
        except FileNotFoundError:
            return False
        if stat.S_ISREG(about.st_mode) and about.st_size == size and (self._shared or about.st_uid == os.geteuid()):
            return True
        _log.warning("%s is not the shard that was kept there; it is removed", path)
        path.unlink(missing_ok=True)
        return False

    def _check_folder(self) -> None:
        about = self.folder.lstat() if not self._shared else self.folder.stat()
        if self._shared:
            if about.st_uid != os.geteuid() or about.st_mode & 0o022:
                _log.warning("%s is shared with other users: what they put there is trained on", self.folder)
            return
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            raise DataError(
                "the shard cache must belong to this user",
                where=str(self.folder),
                hint="Set data.storage.cache to a folder of yours: another user created this one",
            )
        if about.st_mode & 0o077:
            self.folder.chmod(0o700)

    def ensure(self, about: ObjectStat, fetch: Fetch) -> Path:
        """Returns the path of a shard, downloading it if needed. Of several concurrent callers one downloads and the others wait.

        Args:
            about: the shard.
            fetch: writes its bytes to a descriptor.

        Raises:
            CacheFull: there is no room.
            DataError: raised by ``fetch``.
        """
        final = self.path(about)
        while not self._is_complete(final, about.size):
            with self._part(final) as (descriptor, part):
                if self._is_complete(final, about.size):
                    break
                self._reserve(descriptor, about.size)
                try:
                    fetch(about, descriptor)
                    os.fsync(descriptor)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise CacheFull(str(error)) from error
                    raise
                if os.fstat(descriptor).st_size != about.size:
                    raise DataError("download has the wrong size", where=about.url, hint="Try again")
                os.replace(part, final)
        with contextlib.suppress(OSError):
            os.utime(final)
        return final

    def need(self, abouts: Iterable[ObjectStat]) -> None:
        """Declares to other users of the cache which shards this process is going to read; replaces the previous list."""
        names = sorted({self.name(about) for about in abouts})
        while self._needs is None:
            path = self.folder / f".needs-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._needs = os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC, self._mode)
            lock(self._needs, path)
            if not _still(self._needs, path):  # removed as abandoned before it was locked
                os.close(self._needs)
                self._needs = None
        with self._alone():
            data = json.dumps(names).encode()
            os.ftruncate(self._needs, 0)
            os.pwrite(self._needs, data, 0)

    def close(self) -> None:
        """Withdraws the list of :meth:`need`."""
        if self._needs is not None:
            os.close(self._needs)
            self._needs = None

    def held(self) -> int:
        """Returns the bytes of cached shards, including those being downloaded."""
        return sum(size for _, size, _ in self._files())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = self._open(self.folder / ".lock")
        try:
            lock(descriptor, self.folder / ".lock")
            yield
        finally:
            os.close(descriptor)

    def _open(self, path: Path) -> int:
        """Opens or creates a regular file with a single name; links are not followed, so no other file is written.

        Raises:
            DataError: it is not such a file, or belongs to another user while the cache is not shared.
        """
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, self._mode)
        about = os.fstat(descriptor)
        if stat.S_ISREG(about.st_mode) and about.st_nlink <= 1 and (self._shared or about.st_uid == os.geteuid()):
            return descriptor
        os.close(descriptor)
        raise DataError(
            "must be a file that belongs to this user", where=str(path), hint="Set data.storage.cache to a folder of yours"
        )

    @staticmethod
    def _temporary(final: Path) -> Path:
        return final.with_name(f".{final.name}.part")

    @contextlib.contextmanager
    def _part(self, final: Path) -> Iterator[tuple[int, Path]]:
        """Yields the locked, empty file to download into; waits while another process downloads the same shard."""
        path, private = self._temporary(final), False
        while True:
            descriptor = self._open(path)
            try:
                if not lock(descriptor, path) and not private:
                    private, path = True, final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.part")
                    continue  # without locks, two processes must not write to one file
                if not _still(descriptor, path):
                    continue  # completed, or removed as abandoned, while this process waited
                try:
                    yield descriptor, path
                finally:
                    if _still(descriptor, path):
                        path.unlink(missing_ok=True)
                return
            finally:
                os.close(descriptor)

    def _reserve(self, descriptor: int, size: int) -> None:
        """Makes room for a shard and allocates it, so that the disk cannot fill up during the download."""
        with self._alone():
            self._evict(size)
            try:
                os.posix_fallocate(descriptor, 0, max(size, 1))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise CacheFull(str(error)) from error
            os.ftruncate(descriptor, size)

    def _evict(self, size: int) -> None:
        files = self._files()
        excess = max(
            sum(held for _, held, _ in files) + size - self.limit, size + self.floor - shutil.disk_usage(self.folder).free
        )
        if excess <= 0:
            return
        needed = self._needed()
        for path, held, _ in sorted(files, key=lambda file: file[2]):
            if excess <= 0:
                break
            if path.name in needed or path.name.startswith("."):
                continue
            path.unlink(missing_ok=True)
            excess -= held
            _log.debug("evicted %s", path)
        if excess > 0:
            raise CacheFull(f"{excess} bytes too small")

    def _files(self) -> list[tuple[Path, int, float]]:
        """Returns path, bytes and time of last use of every shard, incomplete ones included."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") and not entry.name.endswith(".part"):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    info = entry.stat(follow_symlinks=False)
                    files.append((Path(entry.path), info.st_size, info.st_mtime))
        return files

    def _needed(self) -> set[str]:
        names: set[str] = set()
        for path in self.folder.glob(".needs-*"):
            if not _abandoned(path):
                with contextlib.suppress(OSError, DataError, TypeError):
                    names.update(read_json(path))
        return names

    def _sweep(self) -> None:
        """Removes files of dead processes."""
        for pattern in (".needs-*", ".*.part"):
            for path in self.folder.glob(pattern):
                _abandoned(path)


def _still(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _abandoned(path: Path) -> bool:
    """Whether no process holds a file's lock; the file is then removed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        if not lock(descriptor, path, wait=False) and time.time() - os.fstat(descriptor).st_mtime < _FORGOTTEN:
            return False
    except BlockingIOError:
        return False
    else:
        if _still(descriptor, path):
            path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)
