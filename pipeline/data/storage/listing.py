"""Checksums of shards in a bucket: the listing beside them, and the comparison of a file with an object.

``shards.json`` in the folder of a bucket names its files with size and SHA-256. It is written after all of them, so the files
that it names are complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.data.storage.names import ObjectStat
from pipeline.data.storage.remote import Remote, ShardNotFound
from pipeline.errors import DataError
from pipeline.untrusted import parse_json, plain_name

LISTING = "shards.json"
_FORMAT = 1
_MOST_BYTES = 256 << 20
_SHA = re.compile(r"[0-9a-f]{64}")
_READ = 1 << 20


@dataclass(frozen=True)
class Digest:
    """Checksums of a file.

    Attributes:
        bytes: its size.
        sha256: SHA-256, hexadecimal.
        tag: ETag that S3 gives an object with this content if it is uploaded in parts of the size given to :func:`digest`; empty
            if it is not known.
        md5: MD5, the ETag of an object that was uploaded in one piece; empty if it is not known.
    """

    bytes: int
    sha256: str
    tag: str = ""
    md5: str = ""


def digest(path: Path, part: int) -> Digest:
    """Reads a file once and returns its checksums.

    Args:
        path: the file.
        part: size of the parts of an upload, bytes.

    Raises:
        OSError: the file cannot be read.
    """
    total, complete, parts, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), [], 0
    with path.open("rb") as file:
        while True:
            one, left = hashlib.md5(usedforsecurity=False), part
            while left and (data := file.read(min(_READ, left))):
                for checksum in (total, complete, one):
                    checksum.update(data)
                left, size = left - len(data), size + len(data)
            if left < part:
                parts.append(one.digest())
            if left:
                break
    plain = complete.hexdigest()
    joined = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    return Digest(size, total.hexdigest(), f"{joined}-{len(parts)}" if size > part else plain, plain)


def digest_of_object(remote: Remote, about: ObjectStat) -> Digest:
    """Reads an object and returns its size and SHA-256.

    Raises:
        ShardChanged: it was replaced while it was read.
        StorageUnavailable: storage did not answer within ``outage_timeout``.
    """
    total, scan = hashlib.sha256(), remote.scan(about)
    try:
        for offset in range(0, about.size, _READ):
            total.update(scan.read(offset, min(_READ, about.size - offset)))
    finally:
        scan.close()
    return Digest(about.size, total.hexdigest())


@dataclass(frozen=True)
class Entry:
    """A file of a listing.

    Attributes:
        bytes: its size.
        sha256: SHA-256, hexadecimal.
        tag: the object's version when it was written.
    """

    bytes: int
    sha256: str
    tag: str = ""


@dataclass(frozen=True)
class Listing:
    """Content of ``shards.json``.

    Attributes:
        files: entries by file name.
        exists: whether the folder has one.
        version: of the object that was read; empty if there is none.
    """

    files: Mapping[str, Entry] = field(default_factory=dict)
    exists: bool = False
    version: str = ""

    def digest_of(self, name: str, about: ObjectStat) -> Digest | None:
        """Checksums of an object that is still the version that the listing was written for; ``None`` if they are not known."""
        entry = self.files.get(name)
        if entry is None or entry.bytes != about.size or entry.tag != about.tag:
            return None
        return Digest(entry.bytes, entry.sha256)

    def document(self) -> bytes:
        """The file's content."""
        files = {name: asdict(entry) for name, entry in sorted(self.files.items())}
        return (json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n").encode()


def read_listing(remote: Remote, folder: str) -> Listing:
    """Reads the listing of a folder; an empty one if there is none.

    Args:
        remote: access to the bucket.
        folder: URL that ends with a slash.

    Raises:
        DataError: it is not a listing.
        StorageUnavailable: storage did not answer within ``outage_timeout``.
    """
    url = f"{folder}{LISTING}"
    try:
        about = remote.stat(url)
        if about.size > _MOST_BYTES:
            raise _damaged(url, f"{about.size} bytes")
        content = remote.read(about, 0, about.size) if about.size else b""
    except ShardNotFound:
        return Listing()
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        document = parse_json(content)
        if document["format"] == _FORMAT:
            return Listing({plain_name(name, where=url): _entry(row) for name, row in document["files"].items()}, True, about.tag)
    raise _damaged(url, "its content is not one")


def _entry(row: Mapping[str, object]) -> Entry:
    size, sha, tag = row["bytes"], row["sha256"], row.get("tag", "")
    if type(size) is not int or size < 0 or not isinstance(sha, str) or not _SHA.fullmatch(sha) or not isinstance(tag, str):
        raise ValueError("not an entry")
    return Entry(size, sha, tag)


def _damaged(url: str, why: str) -> DataError:
    return DataError(
        f"is not a listing of shards ({why})", where=url, hint="Delete it, and push the folder again: equal objects are not sent"
    )


def same(remote: Remote, own: Digest, about: ObjectStat, listing: Listing) -> bool:
    """Whether an object has the content of a file: by its ETag, else by the listing, else by reading it.

    Args:
        remote: access to the bucket.
        own: checksums of the file.
        about: the object.
        listing: of its folder.

    Raises:
        ShardChanged, StorageUnavailable: as :func:`digest_of_object`.
    """
    if about.size != own.bytes:
        return False
    tag = about.tag.strip('"')
    if tag and tag in (own.tag, own.md5):
        return True
    known = listing.digest_of(about.url.rpartition("/")[2], about) or digest_of_object(remote, about)
    return known.sha256 == own.sha256
