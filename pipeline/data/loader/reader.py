"""Reads samples by number: one read per sample, validated against the index."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data import storage
from pipeline.data.index.captions import captions_of, decode_text, read_json_member
from pipeline.data.index.fields import CAPTION_SOURCES, FORMATS
from pipeline.data.index.image_header import is_complete
from pipeline.data.index.manifest import Manifest, Rows
from pipeline.data.index.shard_table import Shard
from pipeline.data.order.random import uniforms
from pipeline.errors import DataError

Want = Literal["image", "caption", "label", "segmentation"]
_SUBSTITUTE = 0x50B5  # identifies the random draw
_CONCURRENT = 16  # requests for single samples
_MEMBERS: tuple[Want, ...] = ("image", "caption", "segmentation")


@dataclass(frozen=True)
class Record:
    """One sample as stored in its shard.

    Attributes:
        id: ``shard << 32 | row``.
        key: its own name.
        shard_name: base name of the shard.
        image: encoded bytes; None if not requested or not readable.
        width: pixels after EXIF orientation, from the index.
        height: likewise.
        caption: text, the first of ``captions``; None if not requested or absent.
        label: class index, -1 if not requested or absent.
        segmentation: bytes of the PNG segmentation map; None if not requested or absent.
        status: ``ok``; ``unreadable`` (the shard ends too early or cannot be read), ``corrupt`` (checksum) or ``truncated``
            (no end marker): then ``image`` is None.
        captions: all its non-empty captions.
        members: bytes of all its members by extension, if :class:`pipeline.data.loader.members.MemberReader` read it.
        values: number of its value in each column that it has, if :class:`pipeline.data.loader.columns.ColumnReader` read it.
    """

    id: int
    key: str
    shard_name: str
    image: bytes | None
    width: int
    height: int
    caption: str | None
    label: int
    segmentation: bytes | None
    status: str = "ok"
    captions: tuple[str, ...] = ()
    members: Mapping[str, bytes] = field(default_factory=dict)
    values: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Located:
    """Where a sample's parts are: offset and size in its shard, bytes; and the range that its members are in, if asked for."""

    number: int
    row: int
    shard: Shard
    rows: Rows
    spans: dict[Want, tuple[int, int]]
    low: int = 0
    high: int = 0


@cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CONCURRENT, thread_name_prefix="fovea-ranges")


class Reader:
    """Fetches samples by number. Holds no open file, so it can be sent to other processes.

    Args:
        manifest: index of the samples.
        wants: the parts to read.
        checksum: compare the image's CRC-32 with the index (about 10 µs for 64 KB).
        store: access to the shards.

    Attributes:
        columns: names of the columns of metadata that it reads.
    """

    columns: tuple[str, ...] = ()

    def __init__(
        self,
        manifest: Manifest,
        *,
        wants: Iterable[Want] = ("image", "caption", "label", "segmentation"),
        checksum: bool = True,
        store: storage.Storage | None = None,
    ):
        self.manifest = manifest
        self.wants = frozenset(wants)
        self.checksum = checksum
        self.store = store or storage.Storage()
        self._checked: set[int] = set()
        unknown = sorted(self.wants - {*_MEMBERS, "label"})
        if unknown:
            raise DataError(
                f"{unknown[0]!r} is not a part of a sample",
                where="parts",
                hint="Choose one of image, caption, label, segmentation",
            )

    def fetch(self, ids: NDArray[np.uint64]) -> list[Record]:
        """Returns the records of some samples, in the given order; those in object storage are requested concurrently.

        Errors in one sample's bytes are reported in its status.

        Raises:
            DataError: a whole shard is missing or has another size than when it was indexed; or there is no such sample.
        """
        located = [self._locate(int(number)) for number in np.asarray(ids, dtype=np.uint64).tolist()]
        far = [one for one in located if one.spans and not self.store.is_near(one.shard.about)]
        contents = dict(zip(map(id, far), _requests().map(self._contents, far), strict=True)) if len(far) > 1 else {}
        return [self._record(one, contents[id(one)] if id(one) in contents else self._contents(one)) for one in located]

    def substitute(self, number: int, epoch: int, seed: int, attempt: int) -> int:
        """Returns another sample of the same shard, to substitute one that cannot be used.

        A pure function of its arguments. A shard with a single sample has no other.
        """
        shard, row = number >> 32, number & 0xFFFFFFFF
        others = int(self.manifest.sizes[shard]) - 1
        if others < 1:
            return number
        draw = uniforms(np.array([number], dtype=np.uint64), 1, seed, epoch, _SUBSTITUTE, attempt)[0, 0]
        chosen = int(draw * others)
        return shard << 32 | (chosen + (chosen >= row))

    def _locate(self, number: int) -> Located:
        shard_number, row = number >> 32, number & 0xFFFFFFFF
        if shard_number >= len(self.manifest.shards) or row >= self.manifest.sizes[shard_number]:
            raise DataError(f"there is no sample {number}", where="reader", hint="Use numbers of this manifest's order")
        shard = self.manifest.shards[shard_number]
        if shard_number not in self._checked:
            self._check(shard.about)
            self._checked.add(shard_number)
        rows = self.manifest.rows(shard_number)
        spans = {part: _span(rows, row, part) for part in _MEMBERS if part in self.wants}
        return Located(number, row, shard, rows, {part: span for part, span in spans.items() if span[1] > 0})

    def _contents(self, one: Located) -> dict[str, bytes] | None:
        """The bytes of a sample's parts; ``None`` if they cannot be read."""
        try:
            return _read(self.store, one.shard.about, one.spans)
        except (storage.StorageUnavailable, storage.ShardChanged):
            raise
        except DataError:
            return None

    def _record(self, one: Located, contents: dict[str, bytes] | None) -> Record:
        rows, row, columns = one.rows, one.row, one.rows.columns
        parts, status = contents or {}, "unreadable" if contents is None else "ok"
        image = parts.get("image")
        if image is not None:
            status = self._status(image, rows, row)
        captions = self._captions(parts.get("caption"), rows, row)
        return Record(
            id=one.number,
            key=rows.keys[row],
            shard_name=one.shard.name,
            image=image if status == "ok" else None,
            width=int(columns["width"][row]),
            height=int(columns["height"][row]),
            caption=captions[0] if captions else None,
            label=int(columns["label"][row]) if "label" in self.wants else -1,
            segmentation=parts.get("segmentation"),
            status=status,
            captions=captions,
        )

    def _status(self, image: bytes, rows: Rows, row: int) -> str:
        if self.checksum and zlib.crc32(image) != rows.columns["crc32"][row]:
            return "corrupt"
        if self.manifest.fields.channels is not None:
            return "ok"  # sizes were checked when it was indexed, and are again when it is decoded
        return "ok" if is_complete(image, FORMATS[rows.columns["format"][row]]) else "truncated"

    def _captions(self, data: bytes | None, rows: Rows, row: int) -> tuple[str, ...]:
        if data is None:
            return ()
        fields = self.manifest.fields
        if CAPTION_SOURCES[rows.columns["caption_source"][row]] == "text":
            text, _ = decode_text(data)
            return captions_of(text.splitlines() if fields.caption_lines else text)
        try:
            return captions_of(read_json_member(data)[fields.json_caption])
        except (ValueError, KeyError, TypeError, RecursionError):
            return ()

    def _check(self, about: storage.ObjectStat) -> None:
        if storage.is_remote(about.url):
            return  # every read names the version it needs
        now = self.store.stat(about.url).size
        if now != about.size:
            raise DataError(
                f"has {now} bytes but had {about.size} when it was indexed",
                where=about.url,
                hint="Restore the shard, or rebuild the index and start a new run",
            )


def _span(rows: Rows, row: int, part: str) -> tuple[int, int]:
    return int(rows.columns[f"{part}_offset"][row]), int(rows.columns[f"{part}_size"][row])


def _read(store: storage.Storage, about: storage.ObjectStat, spans: dict[Want, tuple[int, int]]) -> dict[str, bytes]:
    if not spans:
        return {}
    first = min(offset for offset, _ in spans.values())
    last = max(offset + size for offset, size in spans.values())
    data = store.read(about, first, last - first)
    return {part: data[offset - first : offset - first + size] for part, (offset, size) in spans.items()}
