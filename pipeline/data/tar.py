"""A strict walk over tar archives: every member is accounted for, and damage is never taken for the end.

Reads ustar, GNU and PAX headers (long names, large sizes). Links, directories, devices and sparse members are handed on with
their kind, so that the caller can count them. Anything wrong with the archive itself ends the walk with :class:`TarDamage`,
after the members that stand before it.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.data import storage
from pipeline.errors import DataError

BLOCK = 512
Kind = Literal["file", "directory", "link", "device", "sparse", "unknown"]
Reason = Literal["not_tar", "compressed", "empty_file", "truncated", "corrupt", "trailing"]

_SPLIT = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_ZEROS = bytes(BLOCK)
_HEADER_LIMIT = 1 << 20  # no sane PAX or long-name record is larger; a broken size field asks for gigabytes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_KINDS: dict[bytes, Kind] = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.LNKTYPE: "link",
    tarfile.SYMTYPE: "link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "device",
    tarfile.GNUTYPE_SPARSE: "sparse",
}


class TarDamage(DataError):
    """An archive that is not whole.

    Attributes:
        reason: ``not_tar``, ``compressed``, ``empty_file``, ``truncated``, ``corrupt`` (a header is broken) or ``trailing``
            (more data after the end marker).
        at: byte where the walk stopped.
    """

    def __init__(self, what: str, *, where: str, mend: str, reason: Reason, at: int) -> None:
        super().__init__(what, where=where, mend=mend)
        self.reason: Reason = reason
        self.at = at

    def __reduce__(self) -> tuple[object, ...]:
        return _damage, (self.what, self.where, self.mend, self.reason, self.at)


@dataclass(frozen=True)
class Member:
    """One entry of an archive.

    Attributes:
        name: full path inside the archive; bytes that are no UTF-8 are kept as surrogate escapes.
        offset: first byte of the data, counted from the start of the archive.
        size: bytes of data.
        kind: ``file``, ``directory``, ``link``, ``device``, ``sparse`` or ``unknown``.
    """

    name: str
    offset: int
    size: int
    kind: Kind = "file"


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member, by WebDataset's rule.

    The key is the directory with the base name up to its first dot, the extension all after that dot.

    Returns:
        ``(key, extension)``, or None for a base name without an extension or without a key (``README``, ``.hidden``).
    """
    match = _SPLIT.fullmatch(name)
    return None if match is None else (match[1], match[2].lower())


def walk(url: str) -> Iterator[Member]:
    """All members of an archive, in order.

    Raises:
        TarDamage: the file is no tar, is compressed, is cut, has a broken header, or goes on after its end marker.
        DataError: the file cannot be read.
    """
    size = storage.stat(url).size
    at = 0
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    long_name: str | None = None
    while True:
        block = _block(url, at, size)
        if block == _ZEROS:
            if own or long_name is not None:
                raise _broken(url, at, "a long-name header is followed by no member")
            _check_end(url, at, size)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if at == 0:
                raise _no_tar(url, block) from error
            raise _broken(url, at, "the header is damaged (wrong checksum or fields)") from error
        data = at + BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            records = _pax(url, at, _extra(url, at, header.size, size))
            (shared if header.type == tarfile.XGLTYPE else own).update(records)
            at = data + _padded(header.size)
            continue
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            text = _extra(url, at, header.size, size).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = text
            at = data + _padded(header.size)
            continue
        member_size = header.size
        records = {**shared, **own}
        if "size" in records:
            if re.fullmatch(r"[0-9]{1,19}", records["size"]) is None:
                raise _broken(url, at, f"the PAX size {_shown(records['size'])} is no number")
            member_size = int(records["size"])
        if member_size < 0:
            raise _broken(url, at, f"a header claims {member_size} bytes")
        name = long_name or records.get("path") or header.name
        kind = _KINDS.get(header.type, "unknown")
        if any(name.startswith("GNU.sparse.") for name in records):
            kind = "sparse"
        if header.type == tarfile.GNUTYPE_SPARSE:
            data = _after_sparse_map(url, at, block, size)
        # Readers must not skip the "size" of links and directories: it is not stored for them.
        stored = member_size if kind in ("file", "sparse", "unknown") else 0
        if data + stored > size:
            raise _cut(url, at, f"member {_shown(name)} reaches {data + stored - size} bytes past the end")
        yield Member(name, data, stored, kind)
        at = data + _padded(stored)
        own, long_name = {}, None


def samples(url: str, notes: Counter[str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of an archive: runs of neighbouring members with one key; a repeated extension begins a new run.

    Args:
        url: the archive.
        notes: counts what is no part of a sample: links, devices…, and ``no_extension``.

    Yields:
        Key and members by extension.

    Raises:
        TarDamage: after the last run, which may lack members then.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    try:
        for member in walk(url):
            if member.kind != "file":
                if member.kind != "directory":
                    notes[member.kind] += 1
                continue
            parts = split_name(member.name)
            if parts is None:
                notes["no_extension"] += 1
                continue
            if parts[0] != key or parts[1] in members:
                if key is not None:
                    yield key, members
                key, members = parts[0], {}
            members[parts[1]] = member
    except TarDamage:
        if key is not None:
            yield key, members
        raise
    if key is not None:
        yield key, members


def doubts(runs: Sequence[tuple[str, set[str]]]) -> list[str]:
    """What is wrong with runs of a key that occurs more than once.

    Args:
        runs: key and extensions of each run, in order.

    Returns:
        For each run ``""``, ``duplicate_key`` (one of its extensions was there before) or ``not_adjacent`` (the members of the
        key are scattered: none of its runs is the whole sample).
    """
    seen: dict[str, set[str]] = {}
    scattered = set()
    found = []
    for key, extensions in runs:
        before = seen.setdefault(key, set())
        found.append("duplicate_key" if before & extensions else "")
        if before and not before & extensions:
            scattered.add(key)
        before |= extensions
    return [doubt or ("not_adjacent" if key in scattered else "") for (key, _), doubt in zip(runs, found, strict=True)]


def _damage(what: str, where: str, mend: str, reason: Reason, at: int) -> TarDamage:
    return TarDamage(what, where=where, mend=mend, reason=reason, at=at)


def _block(url: str, at: int, size: int) -> bytes:
    if at + BLOCK <= size:
        return storage.read(url, at, BLOCK)
    if size == 0:
        raise TarDamage("is an empty file", where=url, mend="Write or copy the shard again.", reason="empty_file", at=0)
    if at == 0:
        raise _no_tar(url, storage.read(url, 0, size))
    raise _cut(url, at, "the end marker is missing")


def _extra(url: str, at: int, length: int, size: int) -> bytes:
    if not 0 <= length <= _HEADER_LIMIT:
        raise _broken(url, at, f"a long-name header claims {length} bytes")
    if at + BLOCK + length > size:
        raise _cut(url, at, "a long-name header is incomplete")
    return storage.read(url, at + BLOCK, length)


def _pax(url: str, at: int, data: bytes) -> dict[str, str]:
    """The ``length key=value`` records of a PAX header."""
    records: dict[str, str] = {}
    position = 0
    while position < len(data) and data[position] != 0:
        blank = data.find(b" ", position, position + 20)
        digits = data[position:blank] if blank > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        if end <= blank or end > len(data) or data[end - 1 : end] != b"\n" or b"=" not in data[blank:end]:
            raise _broken(url, at, "a PAX header is damaged")
        keyword, value = data[blank + 1 : end - 1].split(b"=", 1)
        records[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = end
    return records


def _after_sparse_map(url: str, at: int, block: bytes, size: int) -> int:
    """Where the data of an old GNU sparse member begins: its map may go on over further blocks."""
    position, more = at + BLOCK, block[482]
    while more:
        if position + BLOCK > size:
            raise _cut(url, at, "the map of a sparse member is incomplete")
        more = storage.read(url, position, BLOCK)[504]
        position += BLOCK
    return position


def _check_end(url: str, at: int, size: int) -> None:
    """Nothing but zeros may follow the end marker, which is two blocks of zeros."""
    if at + 2 * BLOCK > size:
        raise _cut(url, at, "half of the end marker is missing")
    position = at + BLOCK
    while position < size:
        length = min(1 << 20, size - position)
        if any(storage.read(url, position, length)):
            raise TarDamage(
                f"holds more data after its end marker at byte {at}",
                where=url,
                mend="Tars cannot be joined with cat: join them with tar -A, or keep them as shards of their own.",
                reason="trailing",
                at=at,
            )
        position += length


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:40]}…{name[-39:]}")


def _no_tar(url: str, start: bytes) -> TarDamage:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            mend = "Unpack it first: samples are read from the middle of a shard."
            return TarDamage(f"is compressed ({name}), not a plain tar", where=url, mend=mend, reason="compressed", at=0)
    mend = "Name tar files made of samples such as 000.jpg, 000.cls."
    return TarDamage("is no tar archive", where=url, mend=mend, reason="not_tar", at=0)


def _cut(url: str, at: int, why: str) -> TarDamage:
    return TarDamage(
        f"is cut short at byte {at}: {why}", where=url, mend="Copy or write the shard again.", reason="truncated", at=at
    )


def _broken(url: str, at: int, why: str) -> TarDamage:
    return TarDamage(f"is damaged at byte {at}: {why}", where=url, mend="Copy or write the shard again.", reason="corrupt", at=at)
