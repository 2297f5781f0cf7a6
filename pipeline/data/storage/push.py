"""Uploads a directory of shards to a bucket: each file is verified, equal ones are not sent again, the listing comes last.

An object becomes visible when all of its bytes have arrived. A process that is killed leaves complete objects only (and parts of
uploads, which no reader sees); the same call continues with what is missing.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.storage.listing import LISTING, Digest, Entry, Listing, digest, read_listing, same
from pipeline.data.storage.names import is_remote, split
from pipeline.data.storage.remote import Remote, ShardChanged, ShardNotFound, StorageUnavailable
from pipeline.errors import DataError
from pipeline.untrusted import plain_name, printable

_AT_ONCE = 2  # files: one is read for its checksum while another is sent
_TRIES = 50  # of writing the listing while others write it too
_AGAIN = "Run the same command again: what has arrived is not sent again"
LISTS = (".pack.json", ".skipped.txt", ".notes.txt")  # files that a packing writes beside its shards

Report = Callable[[int, int, str], None]


@dataclass
class Transfer:
    """Result of a transfer.

    Attributes:
        sent: names of the files that were copied.
        sent_bytes: their bytes.
        skipped: names of those that were equal at the target already.
        failed: (name, reason) of those that are not there now.
        unchecked: names of copied files for which the source has no checksum; their size was compared.
    """

    sent: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    skipped: list[str] = field(default_factory=list)
    failed: list[tuple[str, DataError]] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The counts in one line."""
        total = f"{len(self.sent)} copied ({self.sent_bytes / 1e6:,.1f} MB), {len(self.skipped)} equal already"
        return f"{total}, {len(self.failed)} failed"


def bucket_folder(url: str) -> str:
    """A folder in a bucket as a URL that ends with a slash.

    Raises:
        DataError: it is a local path, or on a web server.
    """
    if not is_remote(url) or split(url).kind == "https":
        raise DataError("must be a folder of a bucket", where=url, hint="Write s3://bucket/folder, gs://… or az://…")
    return f"{url.rstrip('/')}/"


def files_of(folder: Path) -> tuple[list[Path], int]:
    """Shards of a directory, followed by the lists that a packing writes; and the number of other entries.

    Links are followed for shards only.

    Raises:
        DataError: the directory has no shards, or cannot be read.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})", where=str(folder), hint="Check the path and its permissions"
        ) from error
    shards = [path for path in entries if path.name.endswith(".tar") and not path.name.startswith(".") and path.is_file()]
    files = [path for path in entries if not path.name.startswith(".") and path.is_file() and not path.is_symlink()]
    lists = [path for path in files if path.name == "classes.txt" or path.name.endswith(LISTS)]
    if not shards:
        raise DataError("contains no *.tar", where=str(folder), hint="Name the folder that `fovea shards pack` wrote")
    for path in (*shards, *lists):
        plain_name(path.name, where=str(folder))
    return [*shards, *lists], len(entries) - len(shards) - len(lists)


def push(folder: Path, target: str, remote: Remote, *, overwrite: bool = False, report: Report | None = None) -> Transfer:
    """Uploads the shards of a directory, or continues an upload that was interrupted.

    Args:
        folder: local directory.
        target: URL of a folder in a bucket.
        remote: access to the bucket.
        overwrite: replace objects of the same name with other content.
        report: called with (files done, all files, a line for each).

    Raises:
        DataError: nothing to send, or the bucket cannot be accessed.
        StorageUnavailable: storage stopped answering; its text has the counts.
    """
    target = bucket_folder(target)
    paths, _ = files_of(folder)
    remote.check(target)
    sender = Sender(target, remote, overwrite=overwrite)
    return sender.send(paths, report)


class Sender:
    """Sends files to a folder of a bucket.

    Args:
        target: URL that ends with a slash.
        remote: access to the bucket.
        overwrite: replace objects of the same name with other content.

    Attributes:
        transfer: what was done so far.
    """

    def __init__(self, target: str, remote: Remote, *, overwrite: bool = False) -> None:
        self._target, self._remote, self._overwrite = target, remote, overwrite
        self._listing = read_listing(remote, target)
        self._entries: dict[str, Entry] = {}
        self._lock, self._away = threading.Lock(), threading.Event()
        self.transfer = Transfer()

    def send(self, paths: Sequence[Path], report: Report | None = None) -> Transfer:
        """Sends files, two at a time, and writes the listing if all of them are there.

        Raises:
            StorageUnavailable: storage stopped answering.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            jobs = [pool.submit(self._counted, path) for path in paths]
            away: StorageUnavailable | None = None
            for number, (path, job) in enumerate(zip(paths, jobs, strict=True), 1):
                try:
                    line = job.result()
                except StorageUnavailable as error:
                    away = away or error
                    continue
                if report is not None and line:
                    report(number, len(paths), f"{path.name}: {line}")
        if away is not None:
            raise StorageUnavailable(
                f"{away.what} ({self.transfer.text()})",
                where=away.where,
                hint=f"Run the same command again: what has arrived is not sent again. {away.hint}",
            )
        if not self.transfer.failed:
            self.finish()
        return self.transfer

    def adopt(self, entries: Mapping[str, Entry]) -> None:
        """Adds files to the listing that an earlier call has sent."""
        self._entries = {**entries, **self._entries}

    def one(self, path: Path) -> Entry:
        """Sends a file unless it is there already, and verifies it; returns its entry of the listing.

        Raises:
            DataError: another object has its name, or it did not arrive as it is; the object is then removed.
            StorageUnavailable: storage did not answer within ``outage_timeout``.
        """
        return self._one(path)[0]

    def _one(self, path: Path) -> tuple[Entry, bool]:
        """The file's entry, and whether it had to be sent."""
        url = f"{self._target}{path.name}"
        own = self._digest(path)
        try:
            about = self._remote.stat(url)
            if same(self._remote, own, about, self._listing):
                return self._note(path.name, own, about.tag, sent=False), False
        except ShardNotFound:
            pass
        else:
            if not self._overwrite:
                raise DataError("exists with other content", where=url, hint="Choose another folder, or add --overwrite")
        tag = self._verify(path.name, url, own, self._remote.put(path, url))
        return self._note(path.name, own, tag, sent=True), True

    def finish(self) -> None:
        """Writes the listing, with the files of earlier calls that are still there, and of others that finish at the same time.

        Raises:
            DataError: it is replaced again and again.
        """
        for _ in range(_TRIES):
            earlier = read_listing(self._remote, self._target)  # again: another prefix may have been pushed since
            present = {about.url[len(self._target) :] for about in self._remote.list(self._target)}
            merged = {name: entry for name, entry in {**earlier.files, **self._entries}.items() if name in present}
            if merged == dict(earlier.files):
                return
            with contextlib.suppress(ShardChanged):
                self._remote.replace_bytes(Listing(merged).document(), f"{self._target}{LISTING}", earlier.version)
                return
            time.sleep(random.uniform(0.05, 0.5))
        raise DataError(
            "is replaced by other programs all the time", where=f"{self._target}{LISTING}", hint=f"Stop them. {_AGAIN}"
        )

    def _counted(self, path: Path) -> str:
        if self._away.is_set():
            return ""
        try:
            _, sent = self._one(path)
        except StorageUnavailable:
            self._away.set()
            raise
        except DataError as error:
            with self._lock:
                self.transfer.failed.append((path.name, error))
            return f"failed ({printable(error.what)})"
        return "sent" if sent else "equal already"

    def _digest(self, path: Path) -> Digest:
        try:
            return digest(path, self._remote.part_size)
        except OSError as error:
            raise DataError(
                f"cannot be read ({error.strerror})", where=str(path), hint="Check the file and its permissions"
            ) from error

    def _verify(self, name: str, url: str, own: Digest, tag: str) -> str:
        """Compares an object with the file that was sent; returns its version."""
        try:
            about = self._remote.stat(url)
            # Another program may have sent the same file at the same time.
            replaced = bool(tag) and about.tag != tag and not same(self._remote, own, about, Listing())
        except ShardNotFound:
            replaced = True
        if replaced:
            raise DataError(
                "was replaced or deleted by another program while it was sent", where=url, hint=f"Stop that program. {_AGAIN}"
            )
        if not same(self._remote, own, about, Listing()):
            self._remote.delete(url)
            raise DataError(
                f"has not arrived as the file is, and was removed ({name} changed while it was sent, or the connection is bad)",
                where=url,
                hint=_AGAIN,
            )
        return about.tag

    def _note(self, name: str, own: Digest, tag: str, *, sent: bool) -> Entry:
        entry = Entry(own.bytes, own.sha256, tag)
        with self._lock:
            self._entries[name] = entry
            if sent:
                self.transfer.sent.append(name)
                self.transfer.sent_bytes += own.bytes
            else:
                self.transfer.skipped.append(name)
        return entry
