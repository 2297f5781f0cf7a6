"""Downloads shards from a bucket to a directory: each is verified and appears when it is complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.data.storage.listing import Digest, Listing, digest, digest_of_object, read_listing
from pipeline.data.storage.names import ObjectStat
from pipeline.data.storage.push import LISTS, Report, Transfer
from pipeline.data.storage.remote import Remote, ShardChanged, StorageUnavailable
from pipeline.errors import DataError
from pipeline.runtime.locks import lock
from pipeline.untrusted import plain_name, printable, read_bytes

_RECORD = ".pulled.jsonl"
_MOST_RECORD = 256 << 20
_AGAIN = "Run the same command again: what has arrived is not fetched again"


@dataclass(frozen=True)
class _Pulled:
    """A file that was fetched: which version of which object, and how the file looked afterwards."""

    name: str
    url: str
    tag: str
    bytes: int
    mtime_ns: int


def objects_of(folder: str, remote: Remote) -> list[ObjectStat]:
    """Shards of a folder in a bucket, followed by the lists that a packing writes; nothing below its sub-folders.

    Args:
        folder: URL that ends with a slash.
        remote: access to the bucket.

    Raises:
        DataError: there are no shards, a name cannot be a file's, or the bucket cannot be accessed.
    """
    remote.check(folder)
    objects = [about for about in remote.list(folder) if "/" not in about.url[len(folder) :]]
    shards = [about for about in objects if about.url.endswith(".tar")]
    if not shards:
        raise DataError("contains no *.tar", where=folder, hint="Check the folder's name, and the bucket")
    lists = [about for about in objects if about.url.endswith(("/classes.txt", *LISTS))]
    return [*shards, *lists]


def pull(
    objects: Sequence[ObjectStat], folder: Path, remote: Remote, *, overwrite: bool = False, report: Report | None = None
) -> tuple[Transfer, list[str]]:
    """Downloads objects of one folder of a bucket, or continues a download that was interrupted.

    Args:
        objects: of one folder.
        folder: local directory, created if missing.
        remote: access to the bucket.
        overwrite: replace files of the same name with other content.
        report: called with (files done, all files, a line for each).

    Returns:
        What was done, and names in the bucket's listing that are not in the bucket.

    Raises:
        DataError: the disk has too little space, cannot be written, or another process writes there.
        StorageUnavailable: storage stopped answering; its text has the counts.
    """
    source = objects[0].url.rpartition("/")[0] + "/"
    listing = read_listing(remote, source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _RECORD).open("ab+") as record:
            lock(record.fileno(), str(folder / _RECORD), wait=False)
            for torn in folder.glob(".*.pull"):
                torn.unlink(missing_ok=True)
            transfer = _Receiver(folder, remote, listing, record.fileno(), overwrite).receive(objects, report)
    except BlockingIOError:
        raise DataError("another `fovea shards pull` is running here", where=str(folder), hint="Wait until it ends") from None
    except OSError as error:
        hint = f"Free space, or choose another folder. {_AGAIN}" if error.errno in _FULL else "Check the folder's permissions"
        raise DataError(f"cannot be written ({error.strerror})", where=str(error.filename or folder), hint=hint) from error
    present = {about.url.rpartition("/")[2] for about in objects}
    return transfer, sorted(set(listing.files) - present)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Receiver:
    def __init__(self, folder: Path, remote: Remote, listing: Listing, record: int, overwrite: bool) -> None:
        self._folder, self._remote, self._listing, self._overwrite = folder, remote, listing, overwrite
        self._record, self._pulled = record, _read_record(folder)
        self._transfer = Transfer()

    def receive(self, objects: Sequence[ObjectStat], report: Report | None) -> Transfer:
        missing = [about for about in objects if not self._present(about)]
        self._check_space(missing)
        done = len(self._transfer.skipped) + len(self._transfer.failed)
        for number, about in enumerate(missing, done + 1):
            name = about.url.rpartition("/")[2]
            try:
                self._fetch(about, name)
                line = "fetched"
            except StorageUnavailable as error:
                raise StorageUnavailable(
                    f"{error.what} ({self._transfer.text()})",
                    where=error.where,
                    hint=f"Run the same command again: what has arrived is not fetched again. {error.hint}",
                ) from error
            except DataError as error:
                self._transfer.failed.append((name, error))
                line = f"failed ({printable(error.what)})"
            if report is not None:
                report(number, len(objects), f"{name}: {line}")
        return self._transfer

    def _present(self, about: ObjectStat) -> bool:
        """Whether nothing is to be fetched: the file is there, or another of that name is, which is then a failure."""
        name = plain_name(about.url.rpartition("/")[2], where=about.url.rpartition("/")[0])
        path = self._folder / name
        if not os.path.lexists(path):
            return False
        info, known = path.stat(follow_symlinks=False), self._pulled.get(name)
        recorded = known is not None and (known.url, known.tag) == (about.url, about.tag)
        if known is not None and recorded and (known.bytes, known.mtime_ns) == (info.st_size, info.st_mtime_ns):
            self._transfer.skipped.append(name)
            return True
        expected = self._expected(name, about)
        if path.is_file() and info.st_size == about.size and expected is not None and _agrees(path, expected):
            self._keep(name, about, path)
            self._transfer.skipped.append(name)
            return True
        if self._overwrite:
            return False
        proven = info.st_size != about.size or (expected is not None and expected.sha256)
        what = "exists with other content" if proven else "exists, without a checksum"
        if not proven and expected is not None:
            what = "exists, and its MD5 is not the object's ETag: the content is another, or the bucket encrypts with KMS"
        hint = "Choose another folder, or add --overwrite"
        self._transfer.failed.append((name, DataError(what, where=str(path), hint=hint)))
        return True

    def _check_space(self, missing: Sequence[ObjectStat]) -> None:
        needed, free = sum(about.size for about in missing), shutil.disk_usage(self._folder).free
        if needed > free:
            raise DataError(
                f"{needed / 1e9:.1f} GB are to be fetched and {free / 1e9:.1f} GB are free",
                where=str(self._folder),
                hint="Free space, or choose another folder",
            )

    def _fetch(self, about: ObjectStat, name: str) -> None:
        path, temporary = self._folder / name, self._folder / f".{name}.{os.getpid()}.pull"
        expected = self._expected(name, about)
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(about.size, 1))
                os.ftruncate(file.fileno(), about.size)
                self._remote.download(about, file.fileno())
                os.fsync(file.fileno())
            if (
                expected is not None
                and not _agrees(temporary, expected)
                and not self._same_when_read_again(about, temporary, expected)
            ):
                raise DataError("arrived with another checksum", where=about.url, hint=_AGAIN)
            os.replace(temporary, path)
        except ShardChanged:
            raise DataError("was replaced while it was fetched", where=about.url, hint=_AGAIN) from None
        finally:
            temporary.unlink(missing_ok=True)
        self._keep(name, about, path)
        self._transfer.sent.append(name)
        self._transfer.sent_bytes += about.size
        if expected is None:
            self._transfer.unchecked.append(name)

    def _expected(self, name: str, about: ObjectStat) -> Digest | None:
        """Checksums that the file must have: of the listing, else the ETag where it looks like an MD5."""
        known, tag = self._listing.digest_of(name, about), about.tag.strip('"')
        if known is None and len(tag) == 32 and not set(tag) - set("0123456789abcdef"):
            return Digest(about.size, "", md5=tag)
        return known

    def _same_when_read_again(self, about: ObjectStat, path: Path, expected: Digest) -> bool:
        """Whether a file is equal to its object although the ETag looks like another MD5, as it does with encryption by KMS."""
        return not expected.sha256 and _agrees(path, digest_of_object(self._remote, about))

    def _keep(self, name: str, about: ObjectStat, path: Path) -> None:
        info = path.stat()
        row = asdict(_Pulled(name, about.url, about.tag, info.st_size, info.st_mtime_ns))
        os.write(self._record, (json.dumps(row) + "\n").encode())


def _agrees(path: Path, expected: Digest) -> bool:
    own = digest(path, 1 << 62)
    return own.bytes == expected.bytes and (own.sha256 == expected.sha256 if expected.sha256 else own.md5 == expected.md5)


def _read_record(folder: Path) -> dict[str, _Pulled]:
    pulled: dict[str, _Pulled] = {}
    for line in read_bytes(folder / _RECORD, limit=_MOST_RECORD).decode(errors="replace").splitlines():
        try:
            row = _Pulled(**json.loads(line))
        except (ValueError, TypeError):
            continue  # torn by a kill
        pulled[row.name] = row
    return pulled
