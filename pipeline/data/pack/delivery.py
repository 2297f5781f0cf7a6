"""Sends the shards of a packing to a bucket: each one while the next is written, the lists at the end, the listing last.

The shards are written to a local staging directory and deleted there once they are verified in the bucket, so that it holds three
shards at most. ``.<prefix>.sent.jsonl`` in it records what was sent; without it, equal objects are recognized by their checksums.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from pipeline.data.storage import ObjectStat, ShardNotFound
from pipeline.data.storage.listing import Entry, Listing, read_listing
from pipeline.data.storage.push import LISTS, Sender, Transfer, bucket_folder
from pipeline.data.storage.remote import Remote
from pipeline.errors import DataError
from pipeline.untrusted import read_bytes

_MOST_RECORD = 256 << 20
_LARGEST_LIST = 4 << 30


class Delivery:
    """A packing's target in a bucket. A context manager: leaving it ends its thread.

    Args:
        target: URL of the folder.
        staging: local directory in which the shards are written; created if missing.
        prefix: prefix of the shards' names.
        remote: access to the bucket.
        overwrite: replace objects of the same name with other content, and delete further shards of the prefix.

    Attributes:
        target: URL that ends with a slash.
        has_other_shards: whether the folder has shards of other prefixes.

    Raises:
        DataError: the bucket or the staging directory cannot be accessed.
        StorageUnavailable: storage did not answer within ``outage_timeout``.
    """

    def __init__(self, target: str, staging: Path, prefix: str, remote: Remote, *, overwrite: bool = False) -> None:
        self.target = bucket_folder(target)
        self._staging, self._prefix, self._remote, self._overwrite = staging, prefix, remote, overwrite
        remote.check(self.target)
        self._objects = {about.url[len(self.target) :]: about for about in remote.list(self.target)}
        self._listing: Listing = read_listing(remote, self.target)
        self._sender = Sender(self.target, remote, overwrite=overwrite)
        self._own = re.compile(rf"{re.escape(prefix)}-\d{{5,}}\.tar")
        tars = [name for name in self._objects if name.endswith(".tar") and "/" not in name]
        self.has_other_shards = any(not self._own.fullmatch(name) for name in tars)
        self._pool = ThreadPoolExecutor(1)
        self._job: Future[None] | None = None
        self._record = staging / f".{prefix}.sent.jsonl"
        try:
            staging.mkdir(parents=True, exist_ok=True)
            self._fetch_lists()
        except OSError as error:
            raise DataError(
                f"cannot be written ({error.strerror})", where=str(staging), hint="Name another directory with --staging"
            ) from error
        self._sent = self._read_record()

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def transfer(self) -> Transfer:
        """What was sent so far."""
        return self._sender.transfer

    def has(self, name: str, size: int) -> bool:
        """Whether a finished shard is in the bucket, as it was sent."""
        about = self._objects.get(name)
        if about is None or about.size != size:
            return False
        sent = self._sent.get(name)
        return (sent is not None and sent.tag == about.tag) or self._listing.digest_of(name, about) is not None

    def offer(self, path: Path) -> None:
        """Sends a finished shard in the background, once the one before has arrived.

        Raises:
            DataError: the one before did not arrive.
        """
        if self._job is not None:
            self._job.result()
        self._job = self._pool.submit(self._send, path)

    def finish(self, shards: Iterable[str]) -> None:
        """Sends what is left in the staging directory, then the lists, then the listing; empties the directory.

        Args:
            shards: names of all shards of the packing.

        Raises:
            DataError: something did not arrive, or the folder has further shards of this prefix.
        """
        if self._job is not None:
            self._job.result()
        names = set(shards)
        beyond = [name for name in self._objects if self._own.fullmatch(name) and name not in names]
        if beyond and not self._overwrite:
            raise DataError(
                f"{len(beyond)} further shards of this prefix are there that this packing does not have",
                where=f"{self.target}{min(beyond)}",
                hint="Choose another folder or prefix, or delete them with --overwrite",
            )
        for name in beyond:
            self._remote.delete(f"{self.target}{name}")
        lists = [self._staging / name for name in self._lists() if (self._staging / name).is_file()]
        for path in lists:
            self._remote.put(path, f"{self.target}{path.name}")
        if gone := names - {about.url[len(self.target) :] for about in self._remote.list(self.target)}:
            raise DataError(
                f"{len(gone)} shards that were sent are not there anymore",
                where=f"{self.target}{min(gone)}",
                hint="Run the same command again, after the program that deleted them has ended",
            )
        self._sender.adopt({name: entry for name, entry in self._sent.items() if name in names})
        self._sender.finish()
        for path in (*lists, self._record):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another prefix is being packed to the same folder
            self._staging.rmdir()

    def _lists(self) -> list[str]:
        return [f"{self._prefix}{end}" for end in LISTS] + ["classes.txt"]

    def _send(self, path: Path) -> None:
        entry = self._sender.one(path)
        with self._record.open("ab") as record:
            record.write((json.dumps({"name": path.name, **asdict(entry)}) + "\n").encode())
            record.flush()
            os.fsync(record.fileno())
        path.unlink()

    def _fetch_lists(self) -> None:
        """Fetches the lists of a finished packing, so that the same command does not pack again, and the class names."""
        state = f"{self._prefix}.pack.json"
        fresh = state in self._objects and not (self._staging / state).exists()
        for name in self._lists():
            about = self._objects.get(name)
            if about is not None and (fresh or name == "classes.txt"):
                self._fetch(about, self._staging / name)

    def _fetch(self, about: ObjectStat, path: Path) -> None:
        if about.size > _LARGEST_LIST:
            raise DataError(f"is too large for a list ({about.size} bytes)", where=about.url, hint="Choose another folder")
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with part.open("wb") as file:
                self._remote.download(about, file.fileno())
            part.replace(path)
        except ShardNotFound:
            pass
        finally:
            part.unlink(missing_ok=True)

    def _read_record(self) -> dict[str, Entry]:
        sent: dict[str, Entry] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in read_bytes(self._record, limit=_MOST_RECORD).decode(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # torn by a kill
                    row = json.loads(line)
                    name = str(row.pop("name"))
                    sent[name] = Entry(**row)
        return sent
