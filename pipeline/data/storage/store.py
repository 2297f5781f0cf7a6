"""Unified access to shards: local files, objects read by range, and objects in the node's cache."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.paths import user_name
from pipeline.data.settings import StorageSettings
from pipeline.data.storage import local, signed
from pipeline.data.storage.cache import CacheFull, ShardCache
from pipeline.data.storage.names import ObjectStat, is_remote, local_path, split
from pipeline.data.storage.remote import Remote, ShardNotFound
from pipeline.errors import DataError

_FULL_FOR = 60.0  # seconds after a full cache until room is checked again
_log = logging.getLogger(__name__)


class Source(Protocol):
    """A shard opened for sequential reading, with its name and size in bytes."""

    url: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Reads bytes of the shard."""
        ...

    def close(self) -> None:
        """Closes the shard."""
        ...


class Storage:
    """Reads shards from any storage. Pickled without connections; another process opens its own.

    Args:
        settings: access to object storage, and the shard cache.
        prefetched: whether another thread downloads shards before they are needed; one that is not there yet is then read by
            range instead of being waited for.

    Attributes:
        counters: bytes and seconds of reading since the start, by name.
    """

    def __init__(self, settings: StorageSettings | None = None, *, prefetched: bool = False) -> None:
        self.settings, self.prefetched = settings or StorageSettings(), prefetched
        self.remote = Remote(self.settings)
        self._cache: ShardCache | None = None
        self._full: dict[str, float] = {}
        self.counters: Counter[str] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.settings, signed.known(), self.prefetched)

    @property
    def cache(self) -> ShardCache | None:
        """Returns the node's cache, created at the first call; ``None`` where objects are read by range.

        Raises:
            DataError: the directory is not writable and was set explicitly.
        """
        s = self.settings
        if s.access == "range_read":
            return None
        if self._cache is None:
            limit = None if s.cache_gb is None else int(s.cache_gb * 1e9)
            named = s.cache is not None or bool(os.environ.get("FOVEA_CACHE"))
            self._cache = ShardCache(cache_folder(s), limit=limit, floor=int(s.free_gb * 1e9), shared=named)
        return self._cache

    def check(self, urls: Sequence[str]) -> None:
        """Checks access to every bucket in ``urls``, with short timeouts.

        Raises:
            DataError: a bucket cannot be accessed; with a hint.
        """
        seen = set()
        for url in urls:
            if is_remote(url) and (root := split(url).root) not in seen:
                seen.add(root)
                self.remote.check(url)

    def stat(self, url: str) -> ObjectStat:
        """Returns size and version of a shard.

        Raises:
            DataError: it does not exist, or is not a file.
        """
        return self.remote.stat(url) if is_remote(url) else local.stat(url)

    def stats(self, urls: Sequence[str]) -> list[ObjectStat | DataError]:
        """Runs :meth:`stat` for many URLs and returns errors as values; objects are requested concurrently."""
        far = [url for url in urls if is_remote(url)]
        known = dict(zip(far, self.remote.stats(far), strict=True)) if far else {}
        return [known[url] if url in known else _or_error(local.stat, url) for url in urls]

    def read(self, about: ObjectStat, offset: int, length: int) -> bytes:
        """Reads ``length`` bytes at ``offset`` of that version of a shard. Thread-safe.

        Raises:
            DataError: the shard cannot be read or ends too early.
            StorageUnavailable: object storage did not answer within ``outage_timeout``.
        """
        if length <= 0:
            return b""
        if not is_remote(about.url):
            return local.read(about.url, offset, length)
        kept = self._kept(about, download=not self.prefetched)
        if kept is not None:
            self.counters["cache_bytes"] += length
            return local.read(str(kept), offset, length)
        return self.remote.read(about, offset, length)

    def open(self, about: ObjectStat) -> Source:
        """Opens a shard to be read once sequentially, bypassing the cache."""
        if not is_remote(about.url):
            return _File(about)
        kept = None if self.settings.access == "range_read" or self._cache is None else self._cache.kept(about)
        if kept is not None:
            return _File(about, str(kept))
        return self.remote.scan(about)

    def fetch(self, about: ObjectStat) -> bool:
        """Downloads a shard into the cache ahead of its use; returns whether it is cached now."""
        return not is_remote(about.url) or self._kept(about, download=True) is not None

    def is_near(self, about: ObjectStat) -> bool:
        """Whether a shard is on a local disk, or will be when it is read."""
        if not is_remote(about.url):
            return True
        cache = self.cache
        return cache is not None and (not self.prefetched or cache.has(about))

    def put(self, path: Path, url: str) -> None:
        """Copies a local file to an object or to another path, atomically.

        Raises:
            DataError: it cannot be written.
            StorageUnavailable: object storage did not answer within ``outage_timeout``.
        """
        if is_remote(url):
            self.remote.put(path, url)
            return
        target = Path(local_path(url))
        temporary = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # a link that another user may have created there is not followed
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            with path.open("rb") as source, open(descriptor, "wb") as copy:
                shutil.copyfileobj(source, copy, 16 << 20)
                copy.flush()
                os.fsync(copy.fileno())
            temporary.replace(target)
        except OSError as error:
            raise DataError(
                f"cannot be written ({error.strerror})", where=url, hint="Free space, or check the permissions"
            ) from error

    def get(self, url: str, path: Path) -> None:
        """Copies an object, or a file at another path, to a local file.

        Raises:
            ShardNotFound: there is no such object.
            DataError: the file cannot be written.
            StorageUnavailable: object storage did not answer within ``outage_timeout``.
        """
        try:
            if not is_remote(url):
                shutil.copyfile(local_path(url), path)
                return
            with path.open("wb") as file:
                self.remote.download(self.remote.stat(url), file.fileno())
                os.fsync(file.fileno())
        except FileNotFoundError as error:
            raise ShardNotFound("does not exist", where=url, hint="Check the name") from error
        except OSError as error:
            raise DataError(
                f"cannot be copied ({error.strerror})", where=url, hint=f"Check that {path} can be written"
            ) from error

    def delete(self, url: str) -> None:
        """Deletes an object or a file; a missing one is no error.

        Raises:
            DataError, StorageUnavailable: as :meth:`put`.
        """
        if is_remote(url):
            self.remote.delete(url)
            return
        try:
            Path(local_path(url)).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"cannot be deleted ({error.strerror})", where=url, hint="Check the folder's permissions") from error

    def list(self, folder: str) -> list[str]:
        """Returns the URLs of all files below a directory, at any depth, sorted; empty if there is no such directory.

        Raises:
            StorageUnavailable: object storage did not answer within ``outage_timeout``.
        """
        if is_remote(folder):
            return [about.url for about in self.remote.list(f"{folder.rstrip('/')}/")]
        return sorted(str(path) for path in Path(local_path(folder)).rglob("*") if path.is_file())

    def usage(self) -> dict[str, float]:
        """Returns counters of reading, by name: bytes, requests, retries, seconds, cache hits and misses."""
        return {**self.counters, **self.remote.counters}

    def _kept(self, about: ObjectStat, *, download: bool) -> Path | None:
        cache = self.cache
        if cache is None:
            return None
        if (kept := cache.kept(about)) is not None:
            return kept
        if not download:
            self.counters["ranges_before_shards"] += 1
            return None
        path = cache.path(about)
        if time.monotonic() < self._full.get(path.name, 0.0):
            return None
        self.counters["cache_misses"] += 1
        try:
            return cache.ensure(about, self.remote.download)
        except CacheFull as full:
            self._full[path.name] = time.monotonic() + _FULL_FOR
            self.counters["cache_full"] += 1
            _log.warning(
                "%s: no room in %s (%s): this shard is read by ranges; data.storage.cache_gb is %.1f GB",
                about.url,
                cache.folder,
                full,
                cache.limit / 1e9,
            )
            return None


def _reopened(settings: StorageSettings, queries: dict[str, str], prefetched: bool) -> Storage:
    signed.learn(queries)
    return Storage(settings, prefetched=prefetched)


def _or_error(ask: Callable[[str], ObjectStat], url: str) -> ObjectStat | DataError:
    try:
        return ask(url)
    except DataError as error:
        return error


class _File:
    """A local shard."""

    def __init__(self, about: ObjectStat, path: str = "") -> None:
        self.url, self.size, self._path = about.url, about.size, path or about.url

    def read(self, offset: int, length: int) -> bytes:
        return local.read(self._path, offset, length)

    def close(self) -> None:
        local.forget(self._path)


def cache_folder(settings: StorageSettings) -> Path:
    """Returns the cache directory: as set, else ``$FOVEA_CACHE``, the job's scratch directory, or the temporary directory."""
    if settings.cache is not None:
        return Path(os.path.expanduser(settings.cache))
    for name in ("FOVEA_CACHE", "SLURM_TMPDIR", "LOCAL_SCRATCH"):
        if os.environ.get(name):
            return Path(os.environ[name]) / "fovea-shards"
    return Path(tempfile.gettempdir()) / f"fovea-shards-{user_name()}"
