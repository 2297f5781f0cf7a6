"""Index files of a data set: one sidecar per shard, and one manifest over all of them.

The directory of an index contains

* ``manifest.json``: the shards in order, with size, version and number of accepted samples;
* ``<shard name>-<hash of its url>.npz``: the columns of one shard (:class:`ShardIndex`), an npz without pickles.

Every file is written under a temporary name and renamed, so each is complete or absent. A sample's number is
``shard << 32 | row``, where ``row`` counts the *accepted* samples of that shard only.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, InstanceOf, TypeAdapter

from pipeline.data import storage
from pipeline.data.index.arrays import check_columns, read_arrays
from pipeline.errors import DataError
from pipeline.untrusted import UNPRINTABLE, plain_name, printable, read_json

FORMAT = 3  # 2: lists of captions in JSON; 3: one rule for labels and for the encoding of captions
STATUSES = (
    "ok",
    "missing_image",
    "missing_caption",
    "missing_label",
    "missing_segmentation",
    "not_image",
    "unsupported",
    "truncated",
    "too_large",
    "too_small",
    "duplicate_key",
    "not_adjacent",
    "undecodable",
)
FORMATS = ("none", "jpeg", "png", "webp", "tiff", "bmp", "jpeg2000", "pnm")
CAPTION_SOURCES = ("none", "text", "json")
_COLUMNS = {
    "status": np.uint8,
    "format": np.uint8,
    "extension": np.uint8,
    "caption_source": np.uint8,
    "image_offset": np.int64,
    "image_size": np.int64,
    "width": np.int32,
    "height": np.int32,
    "caption_offset": np.int64,
    "caption_size": np.int64,
    "segmentation_offset": np.int64,
    "segmentation_size": np.int64,
    "label": np.int64,
    "crc32": np.uint32,
    "other_crc32": np.uint32,
}
_CACHED_SHARDS = 256
_MAX_STEM = 230  # maximum length of the shard name within a sidecar's name, bytes
_MANIFEST = 1 << 30  # maximum size of manifest.json, bytes
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
Text = InstanceOf[str]  # pydantic's own type rejects names that are not UTF-8


@dataclass(frozen=True)
class Fields:
    """Which members make a sample, and which samples are accepted.

    Attributes:
        images: extensions of the image, in order of preference.
        caption: extension of the caption, UTF-8 text.
        caption_lines: whether each line of that member is a separate caption.
        label: extension of the class index, decimal text.
        segmentation: extension of the segmentation map (one byte per pixel, PNG).
        json: extension of a JSON object, read for parts that have no member of their own.
        json_caption: key of the caption in it: a string, or a list of strings, each of them a caption.
        json_label: key of the class index in it.
        require: of ``caption``, ``label``, ``segmentation`` those without which a sample is rejected.
        min_side: minimum width and height, pixels.
        max_pixels: maximum pixels, by the header: larger images are never decoded.
    """

    images: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "jp2", "ppm")
    caption: str = "txt"
    label: str = "cls"
    segmentation: str = "seg.png"
    json: str = "json"
    json_caption: str = "caption"
    json_label: str = "label"
    require: tuple[str, ...] = ()
    min_side: int = 16
    max_pixels: int = 50_000_000
    caption_lines: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.require) - {"caption", "label", "segmentation"})
        if unknown:
            raise DataError(
                f"{unknown[0]!r} cannot be required", where="require", hint="Choose one of caption, label, segmentation"
            )
        if not self.images:
            raise DataError("no image extension is given", where="images", hint="Name at least one, such as jpg")

    @classmethod
    def of(cls, document: dict[str, Any]) -> Fields:
        """Parses the rules from a JSON object."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}
        return cls(**values)


@dataclass(frozen=True)
class ShardIndex:
    """Index of one shard.

    Attributes:
        url: where it was read.
        size: bytes.
        tag: version, see :class:`pipeline.data.storage.ObjectStat`.
        fields: the rules it was indexed by.
        damage: empty, or why reading stopped early (only in an index built with ``on_truncated="keep-readable"``).
        notes: counts of things that are not samples: links, members without an extension, class labels that are not numbers…
        keys: the samples' keys, ``[n]``.
        columns: one array ``[n]`` for each name of the format; offsets and sizes are bytes in the shard, size 0 if absent;
            ``width`` and ``height`` are pixels after EXIF orientation; ``label`` is -1 if there is none.
        examples: the first few names for each note.
    """

    url: str
    size: int
    tag: str
    fields: Fields
    damage: str
    notes: dict[str, int]
    keys: tuple[str, ...]
    columns: dict[str, NDArray[Any]]
    examples: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Base name of the shard."""
        return storage.base_name(self.url)

    @property
    def counts(self) -> dict[str, int]:
        """Returns the number of samples by status."""
        counts = np.bincount(self.columns["status"], minlength=len(STATUSES))
        return {status: int(n) for status, n in zip(STATUSES, counts, strict=True) if n}

    @property
    def accepted(self) -> NDArray[np.int64]:
        """Returns the positions of the samples with status ``ok``, ascending."""
        return np.flatnonzero(self.columns["status"] == 0)

    @property
    def digest(self) -> str:
        """Hash of the samples' content, independent of path and modification time: 128 bits in hex."""
        digest = hashlib.blake2b(digest_size=16)
        for key in self.keys:
            digest.update(key.encode("utf-8", "surrogateescape") + b"\0")
        for name in _COLUMNS:
            digest.update(np.ascontiguousarray(self.columns[name]).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the sidecar atomically."""
        blob = b"".join(key.encode("utf-8", "surrogateescape") + b"\0" for key in self.keys)
        meta = {
            "format": FORMAT,
            "url": self.url,
            "size": self.size,
            "tag": self.tag,
            "fields": asdict(self.fields),
            "damage": self.damage,
            "notes": self.notes,
            "examples": self.examples,
        }
        arrays: dict[str, Any] = {
            **self.columns,
            "meta": np.frombuffer(json.dumps(meta, sort_keys=True).encode(), dtype=np.uint8),
            "keys": np.frombuffer(blob, dtype=np.uint8),
        }
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        storage.write_atomically(path, buffer.getvalue())


def make_columns(rows: list[dict[str, int]]) -> dict[str, NDArray[Any]]:
    """Builds the columns of a :class:`ShardIndex` from one dictionary per sample."""
    return {name: np.array([row[name] for row in rows], dtype=dtype) for name, dtype in _COLUMNS.items()}


def sidecar_name(url: str) -> str:
    """Returns the file name of a shard's sidecar; equal base names in different directories do not collide."""
    digest = hashlib.blake2b(storage.absolute(url).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    name = re.sub(rf"{UNPRINTABLE.pattern}|\\\\", "_", storage.base_name(url))
    return f"{name if len(name.encode()) <= _MAX_STEM else name[-_MAX_STEM // 4 :]}-{digest}.npz"


def load_sidecar(path: Path) -> ShardIndex:
    """Reads a sidecar.

    Raises:
        DataError: it is missing, damaged or of another format.
    """
    hint, where = "Build the index again", printable(str(path))
    try:
        arrays = read_arrays(path, {**_COLUMNS, "meta": np.uint8, "keys": np.uint8})
        document = json.loads(arrays.pop("meta").tobytes())
        if isinstance(document, dict) and document.get("format") != FORMAT:
            raise DataError(f"has format {document.get('format')}, this version of fovea reads {FORMAT}", where=where, hint=hint)
        meta = _META.validate_python(document)
        keys = tuple(part.decode("utf-8", "surrogateescape") for part in arrays.pop("keys").tobytes().split(b"\0")[:-1])
        tables = {"status": STATUSES, "format": FORMATS, "caption_source": CAPTION_SOURCES, "extension": meta.fields.images}
        check_columns(arrays, len(keys), meta.size, {name: len(table) for name, table in tables.items()})
    except FileNotFoundError as error:
        raise DataError("sidecar does not exist", where=where, hint=hint) from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"sidecar is damaged ({printable(_first_line(error), limit=160)})", where=where, hint=hint) from error
    examples = {kind: tuple(names) for kind, names in meta.examples.items()}
    return ShardIndex(meta.url, meta.size, meta.tag, meta.fields, meta.damage, meta.notes, keys, arrays, examples)


@dataclass(frozen=True)
class _Meta:
    """Content of a sidecar beside its columns."""

    url: Text
    size: Count
    tag: Text
    fields: Fields
    damage: Text
    notes: dict[Text, Count]
    examples: dict[Text, list[Text]] = field(default_factory=dict)


_META = TypeAdapter(_Meta)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Shard:
    """Summary of one shard in a manifest.

    Attributes:
        url: location of its bytes.
        size: bytes.
        tag: version when it was indexed.
        samples: accepted samples.
        classes: largest class index plus one; 0 without labels.
        digest: hash of its samples.
        sidecar: file name of its index.
        counts: samples by status.
        notes: counts of things that are not samples.
        damage: empty, or why only part of the shard is used.
    """

    url: Text
    size: Count
    tag: Text
    samples: Count
    classes: Count
    digest: Text
    sidecar: Text
    counts: dict[Text, Count] = field(default_factory=dict)
    notes: dict[Text, Count] = field(default_factory=dict)
    damage: Text = ""

    @property
    def name(self) -> str:
        """Base name of the shard."""
        return storage.base_name(self.url)

    @property
    def about(self) -> storage.ObjectStat:
        """Metadata of the version that was indexed."""
        return storage.ObjectStat(self.url, self.size, self.tag)

    @classmethod
    def of(cls, index: ShardIndex) -> Shard:
        """Returns the summary of an index."""
        labels = index.columns["label"][index.accepted]
        return cls(
            url=index.url,
            size=index.size,
            tag=index.tag,
            samples=len(labels),
            classes=int(labels.max(initial=-1)) + 1,
            digest=index.digest,
            sidecar=sidecar_name(index.url),
            counts=index.counts,
            notes=index.notes,
            damage=index.damage,
        )


@dataclass(frozen=True)
class _Document:
    """Content of ``manifest.json``."""

    fingerprint: str
    fields: Fields
    shards: list[Shard]


_DOCUMENT = TypeAdapter(_Document)


@dataclass(frozen=True)
class Rows:
    """The accepted samples of one shard, in row order.

    Attributes:
        keys: ``[n]``.
        columns: arrays ``[n]``, see :class:`ShardIndex`.
    """

    keys: tuple[str, ...]
    columns: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Manifest:
    """Index of a data set: all its shards, in order.

    Attributes:
        directory: directory of the sidecars.
        shards: in the order that numbers the samples.
        fields: the rules the samples were indexed by.
    """

    directory: str
    shards: tuple[Shard, ...]
    fields: Fields = field(default_factory=Fields)
    _cache: OrderedDict[int, Rows] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    @property
    def total(self) -> int:
        """Number of accepted samples."""
        return sum(shard.samples for shard in self.shards)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Accepted samples of each shard, as :class:`pipeline.data.order.order.Order` takes them."""
        return tuple(shard.samples for shard in self.shards)

    @property
    def classes(self) -> int:
        """Largest class index plus one; 0 without labels."""
        return max((shard.classes for shard in self.shards), default=0)

    @property
    def counts(self) -> dict[str, int]:
        """Samples by status, accepted ones first."""
        return {s: n for s in STATUSES if (n := sum(shard.counts.get(s, 0) for shard in self.shards))}

    @property
    def notes(self) -> dict[str, int]:
        """Counts of things that are not samples."""
        names = sorted({name for shard in self.shards for name in shard.notes})
        return {name: sum(shard.notes.get(name, 0) for shard in self.shards) for name in names}

    @property
    def fingerprint(self) -> str:
        """Hash over the ordered shards (name, size, samples): 128 bits in hex, independent of where the files are."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            digest.update(f"{shard.name}\0{shard.size}\0{shard.digest}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def rows(self, shard: int) -> Rows:
        """Returns the accepted samples of a shard; the most recently used shards are cached in memory.

        Raises:
            DataError: the sidecar is missing, damaged, or not the one this manifest was built from.
        """
        rows = self._cache.get(shard)
        if rows is None:
            path = Path(self.directory) / self.shards[shard].sidecar
            index = load_sidecar(path)
            if index.digest != self.shards[shard].digest:
                raise DataError("sidecar belongs to another version of the shard", where=str(path), hint="Build the index again")
            accepted = index.accepted
            rows = Rows(
                tuple(index.keys[row] for row in accepted), {name: column[accepted] for name, column in index.columns.items()}
            )
            self._cache[shard] = rows
            while len(self._cache) > _CACHED_SHARDS:
                self._cache.popitem(last=False)
        return rows

    def column(self, shard: int, name: str) -> NDArray[Any]:
        """Returns one column of a shard's accepted samples, ``[samples]``; names as in :class:`ShardIndex`."""
        return self.rows(shard).columns[name]

    def ids(self, positions: NDArray[np.int64] | None = None) -> NDArray[np.uint64]:
        """Returns the numbers of samples, uint64.

        Args:
            positions: positions in storage order, ``[n]``; by default of all samples.
        """
        ends = np.cumsum(np.array(self.sizes, dtype=np.int64))
        positions = np.arange(self.total) if positions is None else np.asarray(positions)
        shards = np.searchsorted(ends, positions, side="right")
        rows = positions - (ends - np.array(self.sizes, dtype=np.int64))[shards] if len(ends) else positions
        return (shards.astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64)

    def save(self, directory: str | Path) -> None:
        """Writes ``manifest.json``; the sidecars are not moved."""
        document = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "fields": asdict(self.fields),
            "shards": [asdict(shard) for shard in self.shards],
        }
        storage.write_atomically(Path(directory) / "manifest.json", (json.dumps(document, indent=1) + "\n").encode())

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Reads ``manifest.json``.

        Raises:
            DataError: it is missing, damaged or of another format.
        """
        path, hint = Path(directory) / "manifest.json", "Build the index again"
        try:
            document = read_json(path, limit=_MANIFEST)
            if isinstance(document, dict) and document.get("format") != FORMAT:
                raise DataError(
                    f"has format {document.get('format')}, this version of fovea reads {FORMAT}", where=str(path), hint=hint
                )
            checked = _DOCUMENT.validate_python(document)
            for shard in checked.shards:
                plain_name(shard.sidecar, where=str(path))
            manifest = cls(str(directory), tuple(checked.shards), checked.fields)
        except FileNotFoundError as error:
            raise DataError("there is no manifest", where=str(path), hint=hint) from error
        except (OSError, ValueError, RecursionError) as error:
            reason = printable(_first_line(error), limit=160)
            raise DataError(f"manifest is damaged ({reason})", where=str(path), hint=hint) from error
        if manifest.fingerprint != document["fingerprint"]:
            raise DataError("manifest was edited: its fingerprint does not match its shards", where=str(path), hint=hint)
        return manifest

    def diff(self, other: Manifest) -> str:
        """Describes the differences to ``other``; empty if the fingerprints are equal."""
        if self.fingerprint == other.fingerprint:
            return ""
        ours, theirs = ({shard.name: shard for shard in manifest.shards} for manifest in (self, other))
        lines = [f"{self.total} samples in {len(self.shards)} shards here, {other.total} in {len(other.shards)} there"]
        gone, new = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
        changed = [name for name in ours if name in theirs and _content(ours[name]) != _content(theirs[name])]
        for text, names in (("only here", gone), ("only there", new)):
            if names:
                lines.append(f"{text}: {_few(names)}")
        for name in changed[:5]:
            a, b = ours[name], theirs[name]
            lines.append(f"changed: {name} ({a.samples} samples, {a.size} bytes here; {b.samples} samples, {b.size} bytes there)")
        if len(changed) > 5:
            lines.append(f"changed: {len(changed) - 5} more")
        if len(lines) == 1:
            lines.append("the same shards in another order")
        return "\n".join(lines)


def _content(shard: Shard) -> tuple[int, str]:
    return shard.size, shard.digest


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
