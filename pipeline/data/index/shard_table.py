"""Summaries of all shards of a data set, as arrays that the processes of a node share."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.data import storage
from pipeline.data.index.arrays import map_arrays
from pipeline.data.index.fields import COUNTED, FORMAT, STATUSES, Count, Fields, Text
from pipeline.data.index.sidecar import ShardIndex, first_line, sidecar_name, sidecar_stem
from pipeline.errors import DataError
from pipeline.untrusted import printable

FILE = "manifest.npz"
_DIGEST, _STORED = 16, 4  # bytes of a shard's digest, and of what its sidecar's name holds of one
_MAX_SAMPLES = 1 << 32  # a sample's number has 32 bits for its row
_KEPT = 4096  # summaries that are kept after they were asked for
_ARRAYS = {
    "urls": np.uint8,
    "url_ends": np.int64,
    "tags": np.uint8,
    "tag_ends": np.int64,
    "size": np.int64,
    "samples": np.int64,
    "classes": np.int64,
    "digest": np.uint8,
    "stored": np.uint8,
    "counts": np.uint32,
    "remarks": np.uint8,
}


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
        sidecar: path of its index, relative to the directory of all sidecars.
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
    def of(cls, index: ShardIndex, sidecar: str = "") -> Shard:
        """Returns the summary of an index.

        Args:
            index: the index.
            sidecar: path of its sidecar, if the index was derived from the one that is stored.
        """
        labels = index.columns["label"][index.accepted]
        return cls(
            url=index.url,
            size=index.size,
            tag=index.tag,
            samples=len(labels),
            classes=int(labels.max(initial=-1)) + 1,
            digest=index.digest,
            sidecar=sidecar or index.sidecar,
            counts=index.counts,
            notes=index.notes,
            damage=index.damage,
        )


@dataclass(frozen=True)
class _Remarks:
    """What few shards have."""

    notes: dict[Text, Count] = field(default_factory=dict)
    damage: Text = ""


@dataclass(frozen=True)
class Meta:
    """Content of a table's file beside its arrays.

    Attributes:
        fingerprint: of the shards, see :class:`pipeline.data.index.manifest.Manifest`.
        checksum: hash of what numbers the samples; verified whenever the file is opened.
        version: hash of everything, also of the shards' names and versions.
        fields: the rules.
        parent: version of the index that this one was narrowed from; empty otherwise.
        up: levels between the file's directory and the parent of the directory of sidecars.
        selection: hash of the selections that narrowed it; empty without them.
    """

    fingerprint: Text
    checksum: Text
    version: Text
    fields: Fields
    parent: Text = ""
    up: Count = 0
    selection: Text = ""


_META = TypeAdapter(Meta)
_REMARKS = TypeAdapter(dict[int, _Remarks])


class ShardTable(Sequence[Shard]):
    """Summaries of shards; a :class:`Shard` is made when it is asked for.

    Args:
        arrays: by name; texts are bytes with ends, digests 16 bytes each, ``counts`` has a row for each shard.
        rules: the rules that the stored sidecars were built by; they are part of the sidecars' names.
        file: where it is mapped from, and its version; another process maps it too, instead of receiving a copy.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]], rules: Fields, file: tuple[str, str] | None = None) -> None:
        self._arrays, self._rules, self._file = arrays, rules, file
        self._remarks: dict[int, _Remarks] | None = None
        self._kept: dict[int, Shard] = {}

    @classmethod
    def of(cls, shards: Iterable[Shard], rules: Fields) -> ShardTable:
        """Builds a table in memory."""
        shards = list(shards)
        urls = [shard.url.encode("utf-8", "surrogateescape") for shard in shards]
        tags = [shard.tag.encode("utf-8", "surrogateescape") for shard in shards]
        remarks = {n: {"notes": s.notes, "damage": s.damage} for n, s in enumerate(shards) if s.notes or s.damage}
        stored = (s.sidecar.rpartition("-")[2].removesuffix(".npz")[:8].ljust(8, "0") for s in shards)
        digests = [bytes.fromhex(s.digest) for s in shards]
        counted = STATUSES[: max((STATUSES.index(name) + 1 for s in shards for name in s.counts), default=0)]
        counted = counted if len(counted) > COUNTED else STATUSES[:COUNTED]
        if any(len(digest) != _DIGEST for digest in digests):
            raise ValueError("a digest has an unexpected length")
        return cls(
            {
                "urls": _bytes(b"".join(urls)),
                "url_ends": np.cumsum([len(url) for url in urls], dtype=np.int64),
                "tags": _bytes(b"".join(tags)),
                "tag_ends": np.cumsum([len(tag) for tag in tags], dtype=np.int64),
                "size": np.array([s.size for s in shards], dtype=np.int64),
                "samples": np.array([s.samples for s in shards], dtype=np.int64),
                "classes": np.array([s.classes for s in shards], dtype=np.int64),
                "digest": _bytes(b"".join(digests)),
                "stored": _bytes(b"".join(bytes.fromhex(part) for part in stored)),
                "counts": np.array([[s.counts.get(name, 0) for name in counted] for s in shards], dtype=np.uint32).reshape(-1),
                "remarks": _bytes(json.dumps(remarks).encode()),
            },
            rules,
        )

    def __len__(self) -> int:
        return len(self._arrays["size"])

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, index: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        shard = self._kept.get(index)
        if shard is None:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            shard = self._kept[index] = self._shard(index)
        return shard

    def __iter__(self) -> Iterator[Shard]:
        return (self._shard(index) for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, ShardTable | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.version)

    def __reduce__(self) -> tuple[Callable[..., ShardTable], tuple[Any, ...]]:
        if self._file is not None:
            return _opened, self._file
        return ShardTable, (self._arrays, self._rules)

    def _shard(self, index: int) -> Shard:
        a, remark = self._arrays, self.remarks.get(index, _Remarks())
        url, tag = (_text(a[f"{name}s"], a[f"{name}_ends"], index) for name in ("url", "tag"))
        size, stored = int(a["size"][index]), a["stored"][index * _STORED : (index + 1) * _STORED].tobytes().hex()
        width = len(a["counts"]) // len(self)
        counts = a["counts"][index * width : (index + 1) * width].tolist()
        return Shard(
            url=url,
            size=size,
            tag=tag,
            samples=int(a["samples"][index]),
            classes=int(a["classes"][index]),
            digest=a["digest"][index * _DIGEST : (index + 1) * _DIGEST].tobytes().hex(),
            sidecar=sidecar_name(sidecar_stem(url, size, tag, self._rules), stored),
            counts={name: n for name, n in zip(STATUSES, counts, strict=False) if n},
            notes=dict(remark.notes),
            damage=remark.damage,
        )

    @property
    def remarks(self) -> dict[int, _Remarks]:
        """Notes and damage of the shards that have some, by number."""
        if self._remarks is None:
            self._remarks = _REMARKS.validate_json(self._arrays["remarks"].tobytes())
        return self._remarks

    @property
    def samples(self) -> NDArray[np.int64]:
        """Accepted samples of each shard, ``[shards]``."""
        return self._arrays["samples"]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each shard, ``[shards]``."""
        return self._arrays["size"]

    @property
    def may_be_remote(self) -> bool:
        """Whether a shard may lie in object storage: whether a name contains ``://``."""
        return b"://" in self._arrays["urls"].tobytes()

    @property
    def classes(self) -> int:
        """Largest class index plus one."""
        return int(self._arrays["classes"].max(initial=0))

    @property
    def counts(self) -> NDArray[np.int64]:
        """Samples by status, ``[statuses]``; the last statuses are missing if none has them."""
        return self._arrays["counts"].reshape(max(1, len(self)), -1).sum(axis=0, dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Hash over names, sizes and samples of the shards, in order: 128 bits in hex."""
        digest = hashlib.blake2b(digest_size=16)
        a = self._arrays
        hexes = a["digest"].tobytes().hex()
        for index, size in enumerate(a["size"].tolist()):
            name = storage.base_name(_text(a["urls"], a["url_ends"], index))
            shard = hexes[2 * _DIGEST * index : 2 * _DIGEST * (index + 1)]
            digest.update(f"{name}\0{size}\0{shard}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @property
    def checksum(self) -> str:
        """Hash of what numbers the samples and finds them."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("url_ends", "size", "samples", "digest", "stored"):
            digest.update(self._arrays[name].tobytes())
        return digest.hexdigest()

    @property
    def version(self) -> str:
        """Hash of all arrays and of the rules."""
        if self._file is not None:
            return self._file[1]
        digest = hashlib.blake2b(json.dumps(self._rules.document(), sort_keys=True).encode(), digest_size=16)
        for name in sorted(_ARRAYS):
            digest.update(self._arrays[name].tobytes())
        return digest.hexdigest()

    def is_current(self, abouts: Sequence[storage.ObjectStat | DataError]) -> bool:
        """Whether these are the same versions of the same shards, in this order."""
        if len(abouts) != len(self):
            return False
        a = self._arrays
        for index, (about, size) in enumerate(zip(abouts, a["size"].tolist(), strict=True)):
            if isinstance(about, DataError) or about.size != size or about.tag != _text(a["tags"], a["tag_ends"], index):
                return False
            if about.url != _text(a["urls"], a["url_ends"], index):
                return False
        return True

    def save(self, path: Path, meta: Meta) -> None:
        """Writes the table atomically."""
        document = {"format": FORMAT, "rules": self._rules.document(), **asdict(meta), "fields": meta.fields.document()}
        arrays: dict[str, Any] = {**self._arrays, "meta": _bytes(json.dumps(document, sort_keys=True).encode())}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        storage.write_atomically(path, buffer.getvalue())

    @classmethod
    def open(cls, path: Path) -> tuple[ShardTable, Meta]:
        """Maps a table.

        Raises:
            DataError: it is missing, damaged or of another format.
        """
        hint, where = "Build the index again", printable(str(path))
        try:
            arrays = map_arrays(path, {**_ARRAYS, "meta": np.uint8})
            document = json.loads(arrays.pop("meta").tobytes())
            if isinstance(document, dict) and document.get("format") != FORMAT:
                raise DataError(
                    f"has format {document.get('format')}, this version of fovea reads {FORMAT}", where=where, hint=hint
                )
            meta = _META.validate_python(document)
            rules = TypeAdapter(Fields).validate_python(document["rules"])
            _check(arrays)
            table = cls(arrays, rules, (os.path.realpath(path), meta.version))
            if table.remarks and not all(0 <= number < len(table) for number in table.remarks):
                raise ValueError("remarks on shards that do not exist")
        except FileNotFoundError as error:
            raise DataError("there is no manifest", where=where, hint=hint) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
            raise DataError(f"manifest is damaged ({printable(first_line(error), limit=160)})", where=where, hint=hint) from error
        if table.checksum != meta.checksum:
            raise DataError("manifest was edited: its checksum does not match its shards", where=where, hint=hint)
        return table, meta


def _opened(path: str, version: str) -> ShardTable:
    table, meta = ShardTable.open(Path(path))
    if meta.version != version:
        raise DataError(
            "the index was built again while the run started",
            where=printable(path),
            hint="Start the run again: shards have changed",
        )
    return table


def _check(arrays: dict[str, NDArray[Any]]) -> None:
    """Validates lengths and values.

    Raises:
        ValueError: an array is invalid.
    """
    n = len(arrays["size"])
    lengths = {"url_ends": n, "tag_ends": n, "samples": n, "classes": n, "digest": n * _DIGEST, "stored": n * _STORED}
    for name, length in lengths.items():
        if len(arrays[name]) != length:
            raise ValueError(f"{name} has an unexpected length")
    if not n:
        return
    if len(arrays["counts"]) % n or not COUNTED <= len(arrays["counts"]) // n <= len(STATUSES):
        raise ValueError("counts has an unexpected length")
    for name in ("url", "tag"):
        ends = arrays[f"{name}_ends"]
        if int(ends[0]) < 0 or bool((np.diff(ends) < 0).any()) or int(ends[-1]) != len(arrays[f"{name}s"]):
            raise ValueError(f"{name}s are damaged")
    for name, most in (("size", 1 << 62), ("samples", _MAX_SAMPLES), ("classes", 1 << 62)):
        if int(arrays[name].min()) < 0 or int(arrays[name].max()) >= most:
            raise ValueError(f"a value of {name} is invalid")
    if bool((arrays["samples"] != arrays["counts"].reshape(n, -1)[:, 0]).any()):
        raise ValueError("numbers of samples do not agree")


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)


def _text(data: NDArray[np.uint8], ends: NDArray[np.int64], index: int) -> str:
    return data[int(ends[index - 1]) if index else 0 : int(ends[index])].tobytes().decode("utf-8", "surrogateescape")
