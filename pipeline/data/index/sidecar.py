"""The index of one shard: a row for each sample, stored as an npz file without pickles, the *sidecar*.

A sidecar's name holds a hash of the shard's URL and version and of the rules, and a hash of its content. A file is therefore
never replaced by another one: data sets that share shards share sidecars, and changed shards get new ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.data import storage
from pipeline.data.index.arrays import check_columns, read_arrays
from pipeline.data.index.fields import CAPTION_SOURCES, CHANNEL_FORMAT, FORMAT, FORMATS, STATUSES, Count, Fields, Text
from pipeline.errors import DataError
from pipeline.untrusted import UNPRINTABLE, printable

COLUMNS = {
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
_MAX_STEM = 200  # maximum length of the shard name within a sidecar's name, bytes


class Keys(Sequence[str]):
    """Names of samples, stored as bytes and decoded when one is asked for.

    Args:
        data: the names in UTF-8, each followed by a zero byte, ``[bytes]`` uint8.
        rows: the names to show, ``[n]``; by default all of them.
    """

    def __init__(self, data: NDArray[np.uint8], rows: NDArray[np.int64] | None = None) -> None:
        self.data = data
        self._ends = np.flatnonzero(data == 0).astype(np.int32 if len(data) < 1 << 31 else np.int64)
        self._rows = rows

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.data.nbytes + self._ends.nbytes + (0 if self._rows is None else self._rows.nbytes)

    @classmethod
    def of(cls, names: Sequence[str]) -> Keys:
        """Encodes names."""
        data = b"".join(name.encode("utf-8", "surrogateescape") + b"\0" for name in names)
        return cls(np.frombuffer(data, dtype=np.uint8))

    def take(self, rows: NDArray[np.int64]) -> Keys:
        """Returns some of all names."""
        return self if len(rows) == len(self._ends) else Keys(self.data, rows)

    def __len__(self) -> int:
        return len(self._ends if self._rows is None else self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self) if self._rows is None else int(self._rows[index])
        return self.data[self._ends[row - 1] + 1 if row else 0 : self._ends[row]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        names = [part.decode("utf-8", "surrogateescape") for part in self.data.tobytes().split(b"\0")[:-1]]
        return iter(names if self._rows is None else [names[row] for row in self._rows])

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Keys | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


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
    keys: Keys
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
        digest = hashlib.blake2b(self._key_bytes, digest_size=16)
        for name in COLUMNS:
            digest.update(np.ascontiguousarray(self.columns[name]).tobytes())
        return digest.hexdigest()

    @property
    def _key_bytes(self) -> bytes:
        return self.keys.data.tobytes()

    @property
    def sidecar(self) -> str:
        """Path of the sidecar, relative to the directory of all sidecars."""
        return sidecar_name(sidecar_stem(self.url, self.size, self.tag, self.fields), self.digest)

    def save(self, path: Path) -> None:
        """Writes the sidecar atomically."""
        meta = {
            "format": FORMAT,
            "url": self.url,
            "size": self.size,
            "tag": self.tag,
            "fields": self.fields.document(),
            "damage": self.damage,
            "notes": self.notes,
            "examples": self.examples,
        }
        arrays: dict[str, Any] = {
            **self.columns,
            "meta": np.frombuffer(json.dumps(meta, sort_keys=True).encode(), dtype=np.uint8),
            "keys": np.frombuffer(self._key_bytes, dtype=np.uint8),
        }
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        storage.write_atomically(path, buffer.getvalue())

    def requiring(self, require: tuple[str, ...]) -> ShardIndex:
        """Returns the index without the samples that lack a part, as rules with this ``require`` would have built it."""
        if not require:
            return self
        columns = self.columns
        lacks = {
            "caption": columns["caption_source"] == 0,
            "label": columns["label"] < 0,
            "segmentation": columns["segmentation_size"] == 0,
        }
        status = columns["status"].copy()
        for name in require:
            status[(status == 0) & lacks[name]] = STATUSES.index(f"missing_{name}")
        fields = replace(self.fields, require=require)
        return replace(self, fields=fields, columns={**columns, "status": status.astype(np.uint8)})

    def choosing(self, positions: NDArray[np.int64]) -> ShardIndex:
        """Returns the index in which no other accepted samples are left than those at some positions."""
        status = self.columns["status"].copy()
        others = status == 0
        others[positions] = False
        status[others] = STATUSES.index("unselected")
        return replace(self, columns={**self.columns, "status": status})


def make_columns(rows: list[dict[str, int]]) -> dict[str, NDArray[Any]]:
    """Builds the columns of a :class:`ShardIndex` from one dictionary per sample."""
    return {name: np.array([row[name] for row in rows], dtype=dtype) for name, dtype in COLUMNS.items()}


def sidecar_stem(url: str, size: int, tag: str, fields: Fields) -> str:
    """Returns the beginning of the sidecar's name, equal for the same version of a shard and the same rules."""
    channels = [CHANNEL_FORMAT] if fields.channels is not None else []
    rules = json.dumps([FORMAT, size, tag, fields.document(), *channels], sort_keys=True)
    content = f"{storage.absolute(url)}\0{rules}".encode("utf-8", "surrogateescape")
    return f"{_shown_name(url)}-{hashlib.blake2b(content, digest_size=8).hexdigest()}"


def sidecar_name(stem: str, digest: str) -> str:
    """Returns the path of a sidecar, relative to the directory of all sidecars, which has 256 subdirectories.

    Args:
        stem: see :func:`sidecar_stem`.
        digest: hash of its content, see :class:`ShardIndex`.
    """
    return f"{stem[-2:]}/{stem}-{digest[:8]}.npz"


def old_sidecar_name(url: str) -> str:
    """Returns the file name of a shard's sidecar in an index of an earlier version, in which each data set had its own."""
    digest = hashlib.blake2b(storage.absolute(url).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    return f"{_shown_name(url, 230)}-{digest}.npz"


def _shown_name(url: str, limit: int = _MAX_STEM) -> str:
    name = re.sub(rf"{UNPRINTABLE.pattern}|\\\\", "_", storage.base_name(url))
    return name if len(name.encode()) <= limit else name[-limit // 4 :]


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


def load_sidecar(path: Path) -> ShardIndex:
    """Reads a sidecar.

    Raises:
        DataError: it is missing, damaged or of another format.
    """
    hint, where = "Build the index again: fovea shards index SHARDS --check", printable(str(path))
    try:
        arrays = read_arrays(path, {**COLUMNS, "meta": np.uint8, "keys": np.uint8})
        document = json.loads(arrays.pop("meta").tobytes())
        if isinstance(document, dict) and document.get("format") != FORMAT:
            raise DataError(f"has format {document.get('format')}, this version of fovea reads {FORMAT}", where=where, hint=hint)
        meta = _META.validate_python(document)
        names = arrays.pop("keys")
        if len(names) and names[-1]:
            raise ValueError("the last key has no end")
        keys = Keys(names)
        tables = {"status": STATUSES, "format": FORMATS, "caption_source": CAPTION_SOURCES, "extension": meta.fields.images}
        check_columns(arrays, len(keys), meta.size, {name: len(table) for name, table in tables.items()})
    except FileNotFoundError as error:
        raise DataError("sidecar does not exist", where=where, hint=hint) from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"sidecar is damaged ({printable(first_line(error), limit=160)})", where=where, hint=hint) from error
    examples = {kind: tuple(names) for kind, names in meta.examples.items()}
    return ShardIndex(meta.url, meta.size, meta.tag, meta.fields, meta.damage, meta.notes, keys, arrays, examples)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class."""
    return (str(error) or type(error).__name__).splitlines()[0]
