"""Builds the index: reads every shard once and gives every sample a status; nothing is dropped without being counted.

Images are validated by their headers alone. Nothing is decoded, so an image that claims a gigapixel costs nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pipeline.data import storage
from pipeline.data.formats.read import check_libraries, inspect, inspect_stack
from pipeline.data.index import tar
from pipeline.data.index.captions import REPLACED, captions_of, decode_text, encoding_of, json_caption_replaced, read_json_member
from pipeline.data.index.fields import CAPTION_SOURCES, FORMATS, STATUSES, Fields
from pipeline.data.index.image_header import inspect_header
from pipeline.data.index.labels import BAD, read_label
from pipeline.data.index.manifest import SIDECARS, Manifest
from pipeline.data.index.shard_table import Shard, ShardTable
from pipeline.data.index.sidecar import (
    Keys,
    ShardIndex,
    load_sidecar,
    make_columns,
    old_sidecar_name,
    sidecar_stem,
)
from pipeline.errors import DataError, FoveaError
from pipeline.runtime.process_pool import process_pool

__all__ = ["Fields", "UnusableShards", "build", "captions_of", "index_shard"]


class UnusableShards(DataError):
    """Shards that cannot be indexed.

    Attributes:
        shards: summaries of the other shards.
        problems: one error for each shard that cannot be read; empty if all can be read, but none of their samples can be used.
        sidecars: directory of the other shards' sidecars.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        hint: str = "",
        shards: Sequence[Shard] = (),
        problems: Sequence[FoveaError] = (),
        sidecars: Path | None = None,
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.shards, self.problems, self.sidecars = tuple(shards), tuple(problems), sidecars


OnTruncated = Literal["error", "keep-readable"]
_EXCLUDED = STATUSES.index("undecodable")  # by `fovea shards verify --exclude`
_MAX_SIDE = 2**31 - 1  # maximum side that the index can store, pixels; a header may claim more
_MAX_STACK = 1 << 30  # maximum size of the files of one image, with what lies between them, bytes
_SMALL_WORK = 48 << 20  # bytes below which starting processes takes longer than indexing


def index_shard(
    shard: str | storage.ObjectStat, *, fields: Fields, on_truncated: OnTruncated = "error", store: storage.Storage | None = None
) -> ShardIndex:
    """Reads one shard and validates each of its samples.

    Args:
        shard: the shard, or its metadata in storage.
        fields: which members make a sample.
        on_truncated: ``keep-readable`` keeps the complete samples before the truncation; ``error`` raises.
        store: access to the shard.

    Raises:
        DataError: the shard cannot be read, is not a tar or is damaged.
        ConfigError: a library for images of declared channels is not installed.
    """
    if fields.channels is not None:
        check_libraries()
    store = store or storage.Storage()
    about = store.stat(shard) if isinstance(shard, str) else shard
    source = store.open(about)
    try:
        return _walked(source, about, fields, on_truncated)
    finally:
        source.close()


def _walked(source: storage.Source, about: storage.ObjectStat, fields: Fields, on_truncated: OnTruncated) -> ShardIndex:
    notes = tar.Notes()
    runs, damage = tar.runs(source, notes, use_damaged=on_truncated == "keep-readable")
    doubts = tar.doubts([(key, set(members)) for key, members in runs])
    rows = [_row(source, key, members, fields, doubt, notes) for (key, members), doubt in zip(runs, doubts, strict=True)]
    return ShardIndex(
        url=about.url,
        size=about.size,
        tag=about.tag,
        fields=fields,
        damage=damage,
        notes=dict(sorted(notes.items())),
        keys=Keys.of([key for key, _ in runs]),
        columns=make_columns(rows),
        examples={kind: tuple(names) for kind, names in sorted(notes.examples.items())},
    )


def build(
    urls: Sequence[str],
    directory: str | Path,
    *,
    fields: Fields | None = None,
    workers: int | None = None,
    on_truncated: OnTruncated = "error",
    progress: Callable[[int, int, Shard], None] | None = None,
    store: storage.Storage | None = None,
    sidecars: str | Path | None = None,
    check: bool = False,
) -> Manifest:
    """Indexes shards, or reuses an existing index, and writes the manifest.

    If no shard has changed since the last build, only the shards' versions are read. Otherwise a shard's sidecar is reused while
    its URL, size and version, the rules and the format are the same, so adding a shard reads only that one, and an interrupted
    build continues where it stopped.

    Args:
        urls: the shards in order, see :func:`pipeline.data.storage.expand`.
        directory: directory of the manifest.
        fields: which members make a sample.
        workers: processes; None: as many as there are processors and work for them.
        on_truncated: ``keep-readable`` keeps the complete samples before a truncation; ``error`` raises.
        progress: called after each shard with (shards done, total shards, summary of the shard).
        store: access to the shards.
        sidecars: directory of the sidecars, which other data sets may share; by default in ``directory``.
        check: read every sidecar instead of trusting the manifest, and index again what is damaged.

    Raises:
        UnusableShards: shards cannot be used (all are checked first, up to five are named), or no sample can.
        DataError: the directory is not writable.
    """
    fields = fields or Fields()
    folder = Path(directory)
    kept = _Sidecars(Path(sidecars) if sidecars else folder / SIDECARS, folder, fields, on_truncated)
    urls = [storage.absolute(url) for url in urls]
    _make(folder)
    _make(kept.directory)
    store = store or storage.Storage()
    abouts = store.stats(urls)
    known = _known(folder, fields, str(kept.directory))
    if known is not None and not check and known.shards.is_current(abouts) and kept.has_all(known.shards):
        return known
    indexed: dict[str, Shard] = {}
    problems: dict[str, FoveaError] = {}
    pending: list[storage.ObjectStat] = []

    def report(shard: Shard) -> None:
        indexed[shard.url] = shard
        if progress is not None:
            progress(len(indexed) + len(problems), len(urls), shard)

    tables = [manifest.shards for manifest in (*_parts(folder, fields), known) if manifest is not None]
    summaries = {(shard.url, shard.size, shard.tag): shard for table in tables for shard in table}
    for url, about in zip(urls, abouts, strict=True):
        if isinstance(about, DataError):
            problems[url] = about
            continue
        shard = kept.summary(about, summaries.get((about.url, about.size, about.tag)), check=check)
        if shard is None:
            pending.append(about)
        else:
            report(shard)
    for url, result in _index_all(pending, kept.directory, fields, on_truncated, workers, store):
        if isinstance(result, Shard):
            report(result)
        else:
            problems[url] = result
    if problems:
        shards = [indexed[url] for url in urls if url in indexed]
        raise _refusal([problems[url] for url in urls if url in problems], shards, kept.directory)
    manifest = Manifest(str(folder), ShardTable.of([indexed[url] for url in urls], fields), fields, str(kept.directory))
    if manifest.total == 0:
        counted = ", ".join(f"{n} {status}" for status, n in manifest.counts.items()) or "no samples at all"
        raise UnusableShards(
            f"no sample can be used: {counted}",
            where=f"{urls[0]}{' …' if len(urls) > 1 else ''}" if urls else "index",
            hint=f"Give each sample an image with one of the extensions {', '.join(fields.images)}",
            shards=tuple(manifest.shards),
            sidecars=kept.directory,
        )
    return manifest.save(folder)


def _parts(folder: Path, fields: Fields) -> list[Manifest]:
    """Indexes of parts of the shards, which other machines may have written."""
    parts = []
    for part in sorted(folder.glob("part-*")):
        with contextlib.suppress(DataError, OSError):
            parts.append(Manifest.load(part))
    return [part for part in parts if (part.fields, part.parent) == (fields, "")]


def _known(folder: Path, fields: Fields, sidecars: str) -> Manifest | None:
    try:
        known = Manifest.load(folder)
    except DataError:
        return None
    return known if (known.fields, known.parent) == (fields, "") and os.path.abspath(sidecars) == known.sidecars else None


class _Sidecars:
    """The sidecars that exist already."""

    def __init__(self, directory: Path, old: Path, fields: Fields, on_truncated: OnTruncated) -> None:
        self.directory, self._old, self._fields = directory, old, fields
        self._damaged = on_truncated == "keep-readable"  # whether the index of a damaged shard can be used

    def has_all(self, table: ShardTable) -> bool:
        """Whether every sidecar of a table exists, and none is of a shard that cannot be used."""
        if not self._damaged and any(remark.damage for remark in table.remarks.values()):
            return False
        return all(shard.sidecar in self._names for shard in table)

    def summary(self, about: storage.ObjectStat, known: Shard | None, *, check: bool = False) -> Shard | None:
        """Summary of a shard from the last manifest, or from a sidecar; ``None`` if it has to be indexed.

        Samples are excluded in a data set's own manifest: of other sidecars, only those without exclusions are used.
        """
        if known is not None and known.sidecar in self._names and (self._damaged or not known.damage):
            if not check:
                return known
            index = self._usable(self.directory / known.sidecar, about)
            if index is not None and index.sidecar == known.sidecar and index.digest == known.digest:
                return known
        if known is None and (inherited := self._inherited(about)) is not None:
            return inherited
        stem = sidecar_stem(about.url, about.size, about.tag, self._fields)
        for name in self._versions.get(stem, ()):
            index = self._usable(self.directory / name, about)
            if index is not None and index.sidecar == name and not (index.columns["status"] == _EXCLUDED).any():
                return Shard.of(index)
        return None

    def _inherited(self, about: storage.ObjectStat) -> Shard | None:
        """Summary of a shard from the sidecar that an earlier version made for this data set."""
        index = self._usable(self._old / old_sidecar_name(about.url), about)
        if index is None:
            return None
        _save(index, self.directory)
        return Shard.of(index)

    @cached_property
    def _names(self) -> set[str]:
        """Paths of all sidecars, relative to their directory."""
        names = set()
        for part in os.scandir(self.directory):
            with contextlib.suppress(PermissionError, NotADirectoryError):  # of another user
                names |= {f"{part.name}/{name}" for name in os.listdir(part.path) if name.endswith(".npz")}
        return names

    @cached_property
    def _versions(self) -> dict[str, list[str]]:
        """The same by the beginning of their names."""
        versions: dict[str, list[str]] = {}
        for name in self._names:
            versions.setdefault(name.partition("/")[2].rpartition("-")[0], []).append(name)
        return {stem: sorted(names) for stem, names in versions.items()}

    def _usable(self, path: Path, about: storage.ObjectStat) -> ShardIndex | None:
        if not path.exists():
            return None
        try:
            index = load_sidecar(path)
        except DataError:
            return None
        same = (index.url, index.size, index.tag, index.fields) == (about.url, about.size, about.tag, self._fields)
        return index if same and (self._damaged or not index.damage) else None


def _index_all(
    pending: list[storage.ObjectStat],
    folder: Path,
    fields: Fields,
    on_truncated: OnTruncated,
    workers: int | None,
    store: storage.Storage,
) -> Iterator[tuple[str, Shard | FoveaError]]:
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), math.ceil(sum(about.size for about in pending) / _SMALL_WORK))
    workers = min(workers, len(pending))
    if workers <= 1:
        for about in pending:
            yield about.url, _index_one(about, folder, fields, on_truncated, store)
        return
    with process_pool(workers) as pool:
        largest_first = sorted(pending, key=lambda about: about.size, reverse=True)
        jobs = {pool.submit(_index_one, about, folder, fields, on_truncated, store): about.url for about in largest_first}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def _index_one(
    about: storage.ObjectStat, folder: Path, fields: Fields, on_truncated: OnTruncated, store: storage.Storage
) -> Shard | FoveaError:
    try:
        index = index_shard(about, fields=fields, on_truncated=on_truncated, store=store)
    except FoveaError as error:
        return error
    _save(index, folder)
    return Shard.of(index)


def _save(index: ShardIndex, folder: Path) -> None:
    path = folder / index.sidecar
    try:
        index.save(path)
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror})",
            where=str(path),
            hint="Free space, or set data.index (--index) to a folder of your own",
        ) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror})", where=str(folder), hint="Give another directory for the index"
        ) from error


def _refusal(problems: list[FoveaError], shards: list[Shard], sidecars: Path) -> UnusableShards:
    if len(problems) == 1:
        only = problems[0]
        return UnusableShards(only.what, where=only.where, hint=only.hint, shards=shards, problems=problems, sidecars=sidecars)
    among = len(problems) + len(shards)
    named = "; ".join(f"{problem.where}: {problem.what}" for problem in problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    hint = "Copy them again or leave them out; data.on_truncated_shard=keep-readable keeps the complete samples before a cut"
    what = f"{len(problems)} of {among} shards cannot be used: {named}{more}"
    return UnusableShards(what, hint=hint, shards=shards, problems=problems, sidecars=sidecars)


def _row(
    source: storage.Source, key: str, members: dict[str, tar.Member], fields: Fields, doubt: str, notes: tar.Notes
) -> dict[str, int]:
    row = dict.fromkeys(
        ("image_offset", "image_size", "width", "height", "caption_offset", "caption_size", "segmentation_offset"), 0
    )
    row |= {"segmentation_size": 0, "label": -1, "crc32": 0, "other_crc32": 0, "extension": 0, "format": 0, "caption_source": 0}
    status = _add_image(row, source, members, fields)
    others = {name: _data(source, members[name]) for name in (fields.caption, fields.label, fields.json) if name in members}
    document = _json_object(others.get(fields.json), key, notes)
    _add_label(row, others.get(fields.label), document, fields, key, notes)
    _add_caption(row, members, others, document, fields, key, notes)
    if fields.segmentation in members:
        member = members[fields.segmentation]
        row |= {"segmentation_offset": member.offset, "segmentation_size": member.size}
        others[fields.segmentation] = _data(source, member)
    for data in others.values():
        row["other_crc32"] = zlib.crc32(data, row["other_crc32"])
    missing = {"caption": not row["caption_source"], "label": row["label"] < 0, "segmentation": not row["segmentation_size"]}
    if status == "ok":
        status = next((f"missing_{name}" for name in fields.require if missing[name]), "ok")
    row["status"] = STATUSES.index(doubt or status)
    return row


def _add_image(row: dict[str, int], source: storage.Source, members: dict[str, tar.Member], fields: Fields) -> str:
    """Adds where the image is and what its header says; returns its status."""
    channels, limits = fields.channels, {"min_side": fields.min_side, "max_pixels": fields.max_pixels}
    if channels is not None and channels.members:
        own = [members[name] for name in channels.members if name in members]
        if len(own) < len(channels.members):
            return "missing_image"
        # From the header of the first file to the end of the last: with their headers, these bytes are all that decoding needs.
        first, last = min(one.header for one in own), max(one.offset + one.size for one in own)
        if last - first > _MAX_STACK:
            return "too_large"
        data = source.read(first, last - first)
        parts = {name: _data(source, members[name]) for name in channels.members}
        about = inspect_stack(parts, channels, **limits)
        span, extension = (first, last - first), 0
        status, kind, width, height = about.status, about.kind, about.width, about.height
    else:
        name = next((extension for extension in fields.images if extension in members), None)
        if name is None:
            return "missing_image"
        data = _data(source, members[name])
        span, extension = (members[name].offset, members[name].size), fields.images.index(name)
        if channels is None:
            header = inspect_header(data, **limits)
            status, kind, width, height = header.status, header.format, header.width, header.height
        else:
            about = inspect(data, channels, **limits)
            status, kind, width, height = about.status, about.kind, about.width, about.height
    row |= {
        "image_offset": span[0],
        "image_size": span[1],
        "width": min(width, _MAX_SIDE),
        "height": min(height, _MAX_SIDE),
        "crc32": zlib.crc32(data),
        "extension": extension,
        "format": FORMATS.index(kind),
    }
    return status


def _data(source: storage.Source, member: tar.Member) -> bytes:
    return source.read(member.offset, member.size) if member.size else b""


def _json_object(data: bytes | None, key: str, notes: tar.Notes) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        document = read_json_member(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        notes.note("bad_json", key)
        return {}
    return document


def _add_label(
    row: dict[str, int], text: bytes | None, document: dict[str, Any], fields: Fields, key: str, notes: tar.Notes
) -> None:
    if text is None and fields.json_label not in document:
        return
    label, note = read_label(document[fields.json_label] if text is None else text)
    if not isinstance(label, int):  # class names are numbered only by packing, which sees all of them
        notes.note(note or BAD, key)
    row["label"] = label if isinstance(label, int) else -1


def _add_caption(
    row: dict[str, int],
    members: dict[str, tar.Member],
    others: dict[str, bytes],
    document: dict[str, Any],
    fields: Fields,
    key: str,
    notes: tar.Notes,
) -> None:
    text, value = others.get(fields.caption, b""), document.get(fields.json_caption)
    readable, replaced = decode_text(text)
    if text.strip() and (readable.strip() or encoding_of(text) == "utf-8"):  # a byte order mark alone is not a caption
        source, member = "text", members[fields.caption]
    elif not captions_of(value):
        if any(not isinstance(item, str) and item is not None for item in (value if isinstance(value, list) else [value])):
            notes.note("bad_caption", key)
        return
    else:
        source, member = "json", members[fields.json]
        replaced = json_caption_replaced(others[fields.json], value)
    if replaced:
        notes.note(REPLACED, key)
    elif source == "text" and "\0" in readable:
        notes.note("caption_nul", key)
    row |= {"caption_source": CAPTION_SOURCES.index(source), "caption_offset": member.offset, "caption_size": member.size}
