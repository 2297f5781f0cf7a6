"""Strict reader of tar archives: reports every member, and never mistakes damage for the end.

Reads ustar, GNU and PAX headers (long names, large sizes). Links, directories, devices and sparse members are yielded with
their kind, so that the caller can count them. Any error in the archive itself raises :class:`TarDamage`, after the members
before it were yielded.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.data import storage
from pipeline.errors import DataError

BLOCK = 512
Kind = Literal["file", "directory", "link", "device", "sparse", "unknown"]
Reason = Literal["not_tar", "compressed", "empty_file", "truncated", "corrupt", "trailing"]

_SPLIT = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_ZEROS = bytes(BLOCK)
_HEADER_LIMIT = 1 << 20  # no valid PAX or long-name record is larger; a broken size field may claim gigabytes
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
    """A damaged or incomplete archive.

    Attributes:
        reason: ``not_tar``, ``compressed``, ``empty_file``, ``truncated``, ``corrupt`` (a header is broken) or ``trailing``
            (more data after the end marker).
        at: byte offset where reading stopped.
    """

    def __init__(self, what: str, *, where: str, hint: str, reason: Reason, at: int) -> None:
        super().__init__(what, where=where, hint=hint)
        self.reason: Reason = reason
        self.at = at

    def __reduce__(self) -> tuple[object, ...]:
        return _damage, (self.what, self.where, self.hint, self.reason, self.at)


@dataclass(frozen=True)
class Member:
    """One entry of an archive.

    Attributes:
        name: full path inside the archive; bytes that are not UTF-8 are kept as surrogate escapes.
        offset: first byte of the data, from the start of the archive.
        size: bytes of data.
        kind: ``file``, ``directory``, ``link``, ``device``, ``sparse`` or ``unknown``.
        header: first byte of its header, or of the long-name header before that; -1 if unknown.
    """

    name: str
    offset: int
    size: int
    kind: Kind = "file"
    header: int = field(default=-1, compare=False)


class Notes(Counter[str]):
    """Counts, by kind, of things that are not samples or that a sample lacks.

    Attributes:
        examples: the first few names of each kind.
    """

    most_examples = 5

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, list[str]] = {}

    def note(self, kind: str, name: str) -> None:
        """Counts one occurrence of a kind."""
        self[kind] += 1
        named = self.examples.setdefault(kind, [])
        if len(named) < self.most_examples:
            named.append(name)


def split_name(name: str) -> tuple[str, str] | None:
    """Splits a member's name into key and lower-case extension, by WebDataset's rule.

    The key is the directory with the base name up to its first dot, the extension is the rest after that dot.

    Returns:
        ``(key, extension)``, or None for a base name without an extension or without a key (``README``, ``.hidden``).
    """
    match = _SPLIT.fullmatch(name)
    return None if match is None else (match[1], match[2].lower())


def walk(shard: str | storage.Source, start: int = 0) -> Iterator[Member]:
    """Yields all members of an archive, in order.

    Args:
        shard: a local path, or the result of :meth:`pipeline.data.storage.Storage.open`.
        start: offset of the header to begin at; global PAX headers before it are not seen.

    Raises:
        TarDamage: the file is not a tar, is compressed, is truncated, has a broken header, or continues after its end marker.
        DataError: the file cannot be read.
    """
    source = _opened(shard)
    url, size = source.url, source.size
    at = begin = start
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    long_name: str | None = None
    while True:
        block = _block(source, at)
        if block == _ZEROS:
            if own or long_name is not None:
                raise _broken(url, at, "a long-name header is followed by no member")
            _check_end(source, at)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if at == 0:
                raise _no_tar(url, block) from error
            raise _broken(url, at, "the header is damaged (wrong checksum or fields)") from error
        data = at + BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            records = _pax(url, at, _extra(source, at, header.size))
            (shared if header.type == tarfile.XGLTYPE else own).update(records)
            at = data + _padded(header.size)
            continue
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            text = _extra(source, at, header.size).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = text
            at = data + _padded(header.size)
            continue
        member_size = header.size
        records = {**shared, **own}
        if "size" in records:
            if re.fullmatch(r"[0-9]{1,19}", records["size"]) is None:
                raise _broken(url, at, f"the PAX size {shown(records['size'])} is not a number")
            member_size = int(records["size"])
        if member_size < 0:
            raise _broken(url, at, f"a header claims {member_size} bytes")
        name = long_name or records.get("path") or header.name
        kind = _KINDS.get(header.type, "unknown")
        if any(name.startswith("GNU.sparse.") for name in records):
            kind = "sparse"
        if header.type == tarfile.GNUTYPE_SPARSE:
            data = _after_sparse_map(source, at, block)
        # The "size" of links and directories must not be skipped: no data is stored for them.
        stored = member_size if kind in ("file", "sparse", "unknown") else 0
        if data + stored > size:
            raise _cut(url, at, f"member {shown(name)} reaches {data + stored - size} bytes past the end")
        yield Member(name, data, stored, kind, begin)
        at = begin = data + _padded(stored)
        own, long_name = {}, None


def walk_indexed(source: storage.Source, start: int) -> Iterator[Member]:
    """Yields what :func:`walk` yields, for an archive that was walked before: checksums of plain headers are not verified again.

    Args:
        source: the archive.
        start: offset of the header to begin at.

    Raises:
        TarDamage: as :func:`walk`.
    """
    at = start
    while at + BLOCK <= source.size:
        member = _plain(source.read(at, BLOCK), at)
        if member is None or member.offset + member.size > source.size:
            break
        yield member
        at = member.offset + _padded(member.size)
    yield from walk(source, at)


def _plain(header: bytes, at: int) -> Member | None:
    """The member of a header that describes a regular file and needs no other header; ``None`` for any other block."""
    magic, digits = header[257:263], header[124:136].rstrip(b" \0")
    if (
        header[156:157] != b"0"
        or magic not in (b"ustar\0", b"ustar ")
        or not digits.isdigit()
        or b"8" in digits
        or b"9" in digits
    ):
        return None
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if magic == b"ustar\0" else b""
    full = prefix + b"/" + name if prefix else name
    return Member(full.decode("utf-8", "surrogateescape"), at + BLOCK, int(digits, 8))


def samples(shard: str | storage.Source, notes: Notes) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yields the samples of an archive: runs of consecutive members with one key; a repeated extension begins a new run.

    Args:
        shard: the archive, as for :func:`walk`.
        notes: counts what is not part of a sample: links, devices…, and ``no_extension``.

    Yields:
        Key and members by extension.

    Raises:
        TarDamage: after the last run, which may then be incomplete.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    try:
        for member in walk(shard):
            if member.kind != "file":
                if member.kind != "directory":
                    notes.note(member.kind, member.name)
                continue
            parts = split_name(member.name)
            if parts is None:
                notes.note("no_extension", member.name)
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


def runs(
    shard: str | storage.Source, notes: Notes, *, use_damaged: bool = False
) -> tuple[list[tuple[str, dict[str, Member]]], str]:
    """Returns the runs of :func:`samples`, and why only part of the archive could be used (empty if it is complete).

    Args:
        shard: see :func:`walk`.
        notes: see :func:`samples`; ``cut_sample`` is the one before a truncation, which is dropped.
        use_damaged: keep the complete samples before a truncation or a broken header instead of raising.

    Raises:
        TarDamage: the archive is damaged, and may not or cannot be used.
    """
    groups: list[tuple[str, dict[str, Member]]] = []
    walker = samples(shard, notes)
    while True:
        try:
            groups.append(next(walker))
        except StopIteration:
            return groups, ""
        except TarDamage as error:
            if not use_damaged or error.reason not in ("truncated", "corrupt", "trailing"):
                raise
            if error.reason != "trailing" and groups:
                notes.note("cut_sample", groups.pop()[0])  # its remaining members may be lost
            return groups, str(error)


def doubts(runs: Sequence[tuple[str, set[str]]]) -> list[str]:
    """Checks the runs of a key that occurs more than once.

    Args:
        runs: key and extensions of each run, in order.

    Returns:
        For each run ``""``, ``duplicate_key`` (one of its extensions occurred before) or ``not_adjacent`` (the members of the
        key are scattered: none of its runs is the whole sample).
    """
    seen: dict[str, set[str]] = {}
    scattered = set()
    reasons = []
    for key, extensions in runs:
        before = seen.setdefault(key, set())
        reasons.append("duplicate_key" if before & extensions else "")
        if before and not before & extensions:
            scattered.add(key)
        before |= extensions
    return [doubt or ("not_adjacent" if key in scattered else "") for (key, _), doubt in zip(runs, reasons, strict=True)]


def _damage(what: str, where: str, hint: str, reason: Reason, at: int) -> TarDamage:
    return TarDamage(what, where=where, hint=hint, reason=reason, at=at)


def _opened(shard: str | storage.Source) -> storage.Source:
    return storage.Storage().open(storage.stat(shard)) if isinstance(shard, str) else shard


def _block(source: storage.Source, at: int) -> bytes:
    url, size = source.url, source.size
    if at + BLOCK <= size:
        return source.read(at, BLOCK)
    if size == 0:
        raise TarDamage("is an empty file", where=url, hint="Write or copy the shard again", reason="empty_file", at=0)
    if at == 0:
        raise _no_tar(url, source.read(0, size))
    raise _cut(url, at, "the end marker is missing")


def _extra(source: storage.Source, at: int, length: int) -> bytes:
    url, size = source.url, source.size
    if not 0 <= length <= _HEADER_LIMIT:
        raise _broken(url, at, f"a long-name header claims {length} bytes")
    if at + BLOCK + length > size:
        raise _cut(url, at, "a long-name header is incomplete")
    return source.read(at + BLOCK, length)


def _pax(url: str, at: int, data: bytes) -> dict[str, str]:
    """Parses the ``length key=value`` records of a PAX header."""
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


def _after_sparse_map(source: storage.Source, at: int, block: bytes) -> int:
    """Returns where the data of an old GNU sparse member begins: its map may span further blocks."""
    position, more = at + BLOCK, block[482]
    while more:
        if position + BLOCK > source.size:
            raise _cut(source.url, at, "the map of a sparse member is incomplete")
        more = source.read(position, BLOCK)[504]
        position += BLOCK
    return position


def _check_end(source: storage.Source, at: int) -> None:
    """Checks that only zeros follow the end marker, which is two blocks of zeros."""
    url, size = source.url, source.size
    if at + 2 * BLOCK > size:
        raise _cut(url, at, "half of the end marker is missing")
    position = at + BLOCK
    while position < size:
        length = min(1 << 20, size - position)
        if any(source.read(position, length)):
            raise TarDamage(
                f"holds more data after its end marker at byte {at}",
                where=url,
                hint="Join tars with tar -A, not with cat, or keep them as separate shards",
                reason="trailing",
                at=at,
            )
        position += length


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def shown(name: str) -> str:
    """Returns a member's name, quoted and abbreviated, for messages."""
    return repr(name if len(name) <= 80 else f"{name[:40]}…{name[-39:]}")


def _no_tar(url: str, start: bytes) -> TarDamage:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            hint = "Unpack it first: samples are read from the middle of a shard"
            return TarDamage(f"is compressed ({name}), not a plain tar", where=url, hint=hint, reason="compressed", at=0)
    hint = "Name tar files made of samples such as 000.jpg, 000.cls"
    return TarDamage("is not a tar archive", where=url, hint=hint, reason="not_tar", at=0)


def _cut(url: str, at: int, why: str) -> TarDamage:
    return TarDamage(
        f"is truncated at byte {at}: {why}", where=url, hint="Copy or write the shard again", reason="truncated", at=at
    )


def _broken(url: str, at: int, why: str) -> TarDamage:
    return TarDamage(f"is damaged at byte {at}: {why}", where=url, hint="Copy or write the shard again", reason="corrupt", at=at)
