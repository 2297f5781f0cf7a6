"""Reads and writes object storage and web servers. The only module that imports obstore.

obstore resumes an interrupted or stalled response by requesting the remaining bytes, and fails if the object was replaced
meanwhile. An additional retry loop handles storage that is unavailable for minutes.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.data.settings import StorageSettings
from pipeline.data.storage.names import Location, ObjectStat, split
from pipeline.data.storage.signed import query_of
from pipeline.errors import DataError
from pipeline.untrusted import hide_secrets, printable

_FIRST_CONTACT = 8.0  # seconds; an error must be reported before the user suspects a hang
_CONNECTIONS = 64  # maximum number of cached connections
_LONGEST_PAUSE = 30.0
_CREDENTIAL_WORDS = ("169.254.169.254", "169.254.170.2", "metadata.google", "NoCredentials", "redentialProvider")
_KEY_NAMES = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")
_Client = Literal["usual", "probe", "once"]  # as the settings say; for the first contact; without retries

_CONDITIONS = ("PreconditionError", "AlreadyExistsError")  # of the client library: another version is there


def _knows_no_conditions(error: Exception) -> bool:
    """Whether the client or the server says that it cannot write conditionally."""
    # The first match is the client's own text: a URL before it has no blanks, and the server's text comes after it.
    status = re.search(r"Server returned non-2xx status code: (\d+)", str(error))
    return type(error).__name__ in ("NotSupportedError", "NotImplementedError") or (status is not None and status[1] == "501")


class StorageUnavailable(DataError):
    """Storage did not answer, or refused, until the timeout. Not an error of one sample: no substitute is used."""

    retryable = True
    cause = "crash"


class ShardNotFound(DataError):
    """The object does not exist."""


class ShardChanged(DataError):
    """The object is not the version that was indexed."""


class Remote:
    """Reads objects by range. Cheap to create: connections are opened when needed, one client per bucket.

    A process that has used it must not be forked: the client's threads would be missing in the child.

    Args:
        settings: endpoint, timeouts and concurrency.

    Attributes:
        settings: as given.
        counters: ``bytes`` read, ``requests``, ``retries`` and whole ``seconds`` spent waiting in them.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self.settings = self._settings = settings
        self._stores: dict[tuple[str, _Client], Any] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.counters = {"bytes": 0.0, "requests": 0.0, "retries": 0.0, "seconds": 0.0}

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self._settings,)

    def check(self, url: str) -> None:
        """Checks access to a bucket: one request, one retry, a result within ten seconds.

        Raises:
            DataError: missing or wrong credentials, no such bucket, or no server; with a hint.
        """
        location = split(url)
        if location.kind == "https" and (glob.has_magic(location.key) or url.endswith("/")):
            raise _no_listing(url)
        pool = ThreadPoolExecutor(1)
        job = pool.submit(self._contact, url, location)
        try:
            job.result(timeout=_FIRST_CONTACT)
        except Late:
            raise self._explained(url, TimeoutError("no answer"), location) from None
        finally:
            pool.shutdown(wait=False)

    def stat(self, url: str) -> ObjectStat:
        """Returns size and ETag of an object.

        Raises:
            DataError: it does not exist.
            StorageUnavailable: storage did not answer.
        """
        import obstore

        location, ask = split(url), _probe if query_of(url) else obstore.head
        return _stat(url, self._with_retry(url, location, lambda store: ask(store, location.key)))

    def stats(self, urls: list[str]) -> list[ObjectStat | DataError]:
        """Runs :meth:`stat` for many URLs concurrently and returns errors as values.

        Directories with many of the URLs are listed instead.
        """
        known: dict[str, ObjectStat] = {}
        folders = Counter(url.rpartition("/")[0] for url in urls)
        for folder, folder_urls in folders.items():
            if folder_urls >= 32 and split(folder).kind != "https":
                known.update((about.url, about) for about in self.list(f"{folder}/"))
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda url: known.get(url) or self._stat_or_error(url), urls))

    def _stat_or_error(self, url: str) -> ObjectStat | DataError:
        try:
            return self.stat(url)
        except DataError as error:
            return error

    def list(self, prefix: str) -> list[ObjectStat]:
        """Returns all objects at any depth below a URL that ends with a slash, sorted by name.

        Raises:
            DataError: a web server cannot be listed, or there is no such bucket.
        """
        import obstore

        location = split(prefix)
        if location.kind == "https":
            raise _no_listing(prefix)
        objects = self._with_retry(prefix, location, lambda store: obstore.list(store, location.key or None).collect())
        return sorted((_stat(f"{location.root}/{meta['path']}", meta) for meta in objects), key=lambda about: about.url)

    def read(self, about: ObjectStat, offset: int, length: int) -> bytes:
        """Reads ``length`` bytes of that version of an object. Thread-safe.

        Raises:
            ShardChanged: the object has another version now, or is shorter.
            StorageUnavailable: storage did not answer within ``outage_timeout``.
        """
        import obstore

        location = split(about.url)
        options: dict[str, Any] = {"range": (offset, offset + length)}
        if _strong(about.tag):
            options["if_match"] = about.tag
        data = self._with_retry(
            about.url, location, lambda store: bytes(obstore.get(store, location.key, options=options).bytes())
        )
        if len(data) != length:
            raise _changed(about.url)
        self.counters["bytes"] += length
        return data

    def download(self, about: ObjectStat, descriptor: int) -> None:
        """Downloads a whole object to an open file, in concurrent ranges.

        Raises:
            ShardChanged, StorageUnavailable: as :meth:`read`.
            OSError: the disk is full.
        """
        part = self._settings.part_size_mb << 20

        def one(offset: int) -> None:
            data = memoryview(self.read(about, offset, min(part, about.size - offset)))
            while data:
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written

        with ThreadPoolExecutor(self._settings.download_concurrency) as pool:
            for _ in pool.map(one, range(0, about.size, part)):
                pass

    @property
    def part_size(self) -> int:
        """Size of the parts of an upload, bytes; S3 takes none below 5 MiB."""
        return max(self._settings.part_size_mb << 20, 5 << 20)

    def put(self, path: Path, url: str) -> str:
        """Uploads a file to an object atomically, in concurrent parts if it is large; returns the object's version.

        Raises:
            StorageUnavailable: storage did not answer, or refused, within ``outage_timeout``.
            DataError: the file cannot be read, or the URL is that of a web server.
        """
        if not path.is_file():
            raise DataError("is not a file that can be copied", where=str(path), hint="Check whether it was deleted")
        return self._put(path, url)

    def put_bytes(self, content: bytes, url: str) -> str:
        """Uploads a small object atomically; see :meth:`put`."""
        return self._put(content, url)

    def replace_bytes(self, content: bytes, url: str, version: str) -> str:
        """Uploads a small object in place of a known version; returns its new version.

        A bucket that knows no conditions (some servers compatible with S3, which answer 501) replaces whatever is there.

        Args:
            content: the object.
            url: URL in a bucket.
            version: the version that it replaces; empty for an object that must not exist.

        Raises:
            ShardChanged: another version is there.
            StorageUnavailable: as :meth:`put`.
        """
        return self._put(content, url, {"e_tag": version} if version else "create")

    def _put(self, content: Path | bytes, url: str, mode: Any = None) -> str:
        import obstore

        location, part = split(url), self.part_size
        if location.kind == "https":
            raise DataError("a web server does not accept uploads", where=url, hint="Name a bucket or a folder")
        parallel = self._settings.download_concurrency

        def send(store: Any) -> Any:
            if mode is not None:
                try:  # by a client without retries, which it would spend on a 501
                    return obstore.put(self._store(location, "once"), location.key, content, mode=mode)
                except Exception as error:
                    if not _knows_no_conditions(error):
                        raise
            return obstore.put(store, location.key, content, chunk_size=part, max_concurrency=parallel)

        return str(self._with_retry(url, location, send)["e_tag"] or "")

    def delete(self, url: str) -> None:
        """Deletes an object; a missing one is no error.

        Raises:
            StorageUnavailable: as :meth:`put`.
        """
        import obstore

        location = split(url)
        with contextlib.suppress(ShardNotFound):
            self._with_retry(url, location, lambda store: obstore.delete(store, location.key))

    def scan(self, about: ObjectStat) -> Scan:
        """Opens an object for sequential reading in large pieces, for callers that read small ones."""
        return Scan(self, about, self._settings.part_size_mb << 20)

    def _contact(self, url: str, location: Location) -> None:
        import obstore

        store = self._store(location, "probe", query_of(url))
        try:
            if location.kind == "https" or (location.key and not glob.has_magic(location.key) and not location.key.endswith("/")):
                try:
                    (_probe if query_of(url) else obstore.head)(store, location.key)
                    return
                except FileNotFoundError:
                    if location.kind == "https":
                        raise
            # For a missing object, storage does not report whether its bucket exists; a listing does.
            folder = re.split(r"[*?\[]", location.key)[0].rpartition("/")[0]
            next(iter(obstore.list(store, folder or None, chunk_size=1)), None)
        except Exception as error:
            raise self._explained(url, error, location) from error

    def _with_retry(self, url: str, location: Location, act: Callable[[Any], _Value]) -> _Value:
        """Calls ``act`` and retries while storage is unavailable, with a backoff of up to 30 s, until ``outage_timeout``."""
        if os.getpid() != self._pid:
            raise DataError(
                "object storage was used before this process was forked", where=url, hint="Start processes with the spawn method"
            )
        begin, pause = time.monotonic(), 0.5
        while True:
            try:
                self.counters["requests"] += 1
                value = act(self._store(location, query=query_of(url)))
                self.counters["seconds"] += time.monotonic() - begin
                return value
            except Exception as error:
                if isinstance(error, FileNotFoundError) or type(error).__name__ in _CONDITIONS:
                    raise self._explained(url, error, location) from error
                waited = time.monotonic() - begin
                if waited + pause > self._settings.outage_timeout:
                    raise self._explained(url, error, location, waited) from error
                _log.warning("%s: %s; trying again in %.0f s (after %.0f s)", url, _short(error), pause, waited)
                self.counters["retries"] += 1
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _store(self, location: Location, client: _Client = "usual", query: str = "") -> Any:
        key = (f"{location.root}/?{query}" if query else location.root, client)
        with self._lock:
            store = self._stores.get(key)
            if store is None:
                store = self._stores[key] = self._connect(replace(location, root=key[0]), client)
                if query and len(self._stores) > _CONNECTIONS:  # each signed link has its own client
                    del self._stores[next(iter(self._stores))]
            return store

    def _connect(self, location: Location, client: _Client) -> Any:
        from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

        s, probe = self._settings, client == "probe"
        endpoint = s.endpoint or (os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
        plain = location.root.startswith("http://") or (location.kind == "s3" and endpoint.startswith("http://"))
        common: dict[str, Any] = {
            "client_options": {
                "connect_timeout": timedelta(seconds=3 if probe else 5),
                "timeout": timedelta(seconds=4 if probe else s.timeout),
                "allow_http": plain or bool(s.endpoint and s.endpoint.startswith("http://")),
            },
            "retry_config": {
                "max_retries": {"probe": 1, "once": 0}.get(client, s.retries),
                "retry_timeout": timedelta(seconds=5 if probe else 180),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=1 if probe else 15),
                    "base": 2,
                },
            },
        }
        name = location.root.partition("://")[2]
        if location.kind == "s3":
            extra: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
            region = s.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            extra |= {"region": region} if region else {}
            extra |= {"skip_signature": True} if s.anonymous else {}
            provider = None if s.anonymous else _profile_credentials()
            return S3Store(name, **extra, **common, **({"credential_provider": provider} if provider else {}))
        if location.kind == "gs":
            extra = {"skip_signature": True} if s.anonymous else {}
            return GCSStore(name, **extra, **common)
        if location.kind == "az":
            extra = {"skip_signature": True} if s.anonymous else {}
            extra |= {"endpoint": s.endpoint} if s.endpoint else {}
            return AzureStore.from_url(location.root, **extra, **common)
        return HTTPStore(location.root, **common)

    def _explained(self, url: str, error: Exception, location: Location, waited: float | None = None) -> DataError:
        """Converts an error of the client library to a message with a hint."""
        text, kind = str(error), type(error).__name__
        if kind in _CONDITIONS:
            return _changed(url)
        if "NoSuchBucket" in text:
            return DataError(f"bucket {location.root} does not exist", where=url, hint="Check its name and the endpoint")
        if isinstance(error, FileNotFoundError):
            return ShardNotFound("shard does not exist", where=url, hint="Check the path and the range of the pattern")
        away = StorageUnavailable if waited is not None else DataError
        spent = f" for {waited:.0f} s" if waited else ""
        keys = {
            "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; for public data, data.storage.anonymous=true",
            "gs": "Set GOOGLE_APPLICATION_CREDENTIALS, or data.storage.anonymous=true for public data",
            "az": "Set AZURE_STORAGE_ACCOUNT_KEY or another Azure credential, or data.storage.anonymous=true for public data",
        }.get(location.kind, "Check that the server lets you read it")
        if query_of(url):
            keys = "Sign the link again and restart; the run resumes"
        if any(
            word in text for word in ("169.254.169.254", "169.254.170.2", "metadata.google", "NoCredentials", "redentialProvider")
        ):
            return away(f"no credentials were found for {location.root}{spent}", where=url, hint=keys)
        if kind in ("PermissionDeniedError", "UnauthenticatedError") or "status code: 403" in text or "status code: 401" in text:
            return away(f"access was refused{spent} ({_short(error)})", where=url, hint=keys)
        endpoint = self._settings.endpoint or os.environ.get("AWS_ENDPOINT_URL")
        through = f" (endpoint {endpoint})" if endpoint and location.kind == "s3" else ""
        hint = "Check the network, data.storage.endpoint or AWS_ENDPOINT_URL, and the region"
        if isinstance(error, TimeoutError) and location.kind == "s3" and not through and not _has_keys():
            return away("no credentials were found and the metadata server did not answer", where=url, hint=keys)
        return away(f"{location.root}{through} did not answer{spent} ({_short(error)})", where=url, hint=hint)


class Scan:
    """Reads an object sequentially in large pieces: two are kept, and the next is fetched while one is used."""

    def __init__(self, remote: Remote, about: ObjectStat, piece: int) -> None:
        self._remote, self._about, self._piece = remote, about, piece
        self.url, self.size = about.url, about.size
        self._pool = ThreadPoolExecutor(1)
        self._jobs: dict[int, Any] = {}

    def read(self, offset: int, length: int) -> bytes:
        """Reads bytes of the object; see :meth:`Remote.read`."""
        first, last = offset // self._piece, (offset + length - 1) // self._piece
        parts = []
        for number in range(first, last + 1):
            begin = number * self._piece
            data = self._get(number)
            parts.append(data[max(offset - begin, 0) : offset + length - begin])
        return b"".join(parts)

    def close(self) -> None:
        """Releases the pieces."""
        self._jobs.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _get(self, number: int) -> bytes:
        for chunk in (number, number + 1):
            begin = chunk * self._piece
            if chunk not in self._jobs and begin < self.size:
                self._jobs[chunk] = self._pool.submit(self._remote.read, self._about, begin, min(self._piece, self.size - begin))
        for old in [n for n in self._jobs if n < number - 1 or n > number + 1]:
            del self._jobs[old]
        data: bytes = self._jobs[number].result()
        return data


def _probe(store: Any, key: str) -> Any:
    """Returns the result of ``obstore.head`` from a request for one byte: a signed link often allows no other kind of request."""
    import obstore

    return obstore.get(store, key, options={"range": (0, 1)}).meta


def _stat(url: str, meta: Any) -> ObjectStat:
    return ObjectStat(url, int(meta["size"]), str(meta.get("e_tag") or meta["last_modified"].isoformat()))


def _strong(tag: str) -> bool:
    """Whether an ETag can be used as a condition; weak ones and timestamps cannot."""
    return tag.startswith('"')


def _no_listing(url: str) -> DataError:
    return DataError("a web server cannot be listed", where=url, hint="Name the shards with {00000..00099}")


def _changed(url: str) -> ShardChanged:
    return ShardChanged(
        "was replaced since it was indexed",
        where=url,
        hint="Start again: the shard is indexed again, and the run continues if its samples are the same",
    )


def _short(error: Exception) -> str:
    text = str(error).split("\n", 1)[0]
    for mark in ("Server returned non-2xx status code: ", "HTTP error: "):
        if mark in text:
            text = text.split(mark, 1)[1]
    return printable(hide_secrets(text.strip(": "))[:160]) or type(error).__name__


def _has_keys() -> bool:
    return any(name in os.environ for name in _KEY_NAMES)


def _profile_credentials() -> Any:
    """Returns credentials of ``~/.aws`` and single sign-on, which need boto3.

    ``None`` if the environment has keys, or if there is neither a profile nor such a file.
    """
    places = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    files = [Path(os.path.expanduser(os.environ.get(name, usual))) for name, usual in places.items()]
    if _has_keys() or not ("AWS_PROFILE" in os.environ or any(file.exists() for file in files)):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise DataError(
            "credentials of ~/.aws need boto3",
            where="AWS_PROFILE",
            hint="Install boto3 (pip install 'fovea[aws]'), or set AWS_ACCESS_KEY_ID",
        ) from error
    try:
        return Boto3CredentialProvider()
    except Exception as error:
        raise DataError(
            f"~/.aws gave no credentials ({_short(error)})",
            where="AWS_PROFILE",
            hint="Log in, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ) from error
