"""Index of a data set: its shards in order, and the rows of each of them.

The directory of an index contains ``manifest.npz``, a table of the shards (:mod:`pipeline.data.index.shard_table`). The rows are
in one *sidecar* per shard (:mod:`pipeline.data.index.sidecar`), in a directory that all data sets share.

Every file is written under a temporary name and renamed, so each is complete or absent. A sample's number is
``shard << 32 | row``, where ``row`` counts the *accepted* samples of that shard only.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.data.index.fields import FORMAT, STATUSES, Fields
from pipeline.data.index.selected import SelectedRows
from pipeline.data.index.shard_table import FILE, Meta, Shard, ShardTable
from pipeline.data.index.sidecar import Keys, ShardIndex, first_line, load_sidecar
from pipeline.errors import DataError
from pipeline.untrusted import printable, read_json

SIDECARS = "sidecars"
CACHE_BYTES = 256 << 20  # rows that are kept in memory
_OLD_LIMIT = 1 << 30  # maximum size of the manifest.json of an earlier version, bytes
_MAX_UP = 2
_VERSIONS = 8


@dataclass(frozen=True)
class Rows:
    """The accepted samples of one shard, in row order.

    Attributes:
        keys: ``[n]``.
        columns: arrays ``[n]``, see :class:`pipeline.data.index.sidecar.ShardIndex`.
    """

    keys: Keys
    columns: dict[str, NDArray[Any]]


class _Cache:
    """The most recently used rows, up to a number of bytes, and the rows that selections keep."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.selected: SelectedRows | None = None
        self._limit, self._bytes = limit, 0
        self._rows: OrderedDict[int, tuple[Rows, int]] = OrderedDict()

    def get(self, shard: int) -> Rows | None:
        if shard not in self._rows:
            return None
        self._rows.move_to_end(shard)
        return self._rows[shard][0]

    def add(self, shard: int, rows: Rows, size: int) -> None:
        self._rows[shard] = rows, size
        self._bytes += size
        while self._bytes > self._limit and len(self._rows) > 1:
            self._bytes -= self._rows.popitem(last=False)[1][1]


@dataclass(frozen=True)
class Manifest:
    """Index of a data set: all its shards, in order.

    Attributes:
        directory: directory of the manifest.
        shards: in the order that numbers the samples.
        fields: the rules the samples were indexed by.
        sidecars: directory of the sidecars; by default ``sidecars`` in the manifest's directory.
        parent: version of the index that this one was narrowed from; empty otherwise.
        selection: hash of the selections that it was narrowed by; empty without them.
    """

    directory: str
    shards: ShardTable
    fields: Fields = field(default_factory=Fields)
    sidecars: str = ""
    parent: str = ""
    selection: str = ""
    _cache: _Cache = field(default_factory=_Cache, init=False, repr=False, compare=False)
    _known: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.sidecars:
            object.__setattr__(self, "sidecars", str(Path(self.directory) / SIDECARS))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": _Cache()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    @property
    def rules(self) -> Fields:
        """The rules that the sidecars were built by: ``fields``, without ``require`` if this index was narrowed."""
        return replace(self.fields, require=()) if self.parent else self.fields

    @property
    def total(self) -> int:
        """Number of accepted samples."""
        return int(self.shards.samples.sum())

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Accepted samples of each shard, ``[shards]``, as :class:`pipeline.data.order.order.Order` takes them."""
        return self.shards.samples

    @property
    def classes(self) -> int:
        """Largest class index plus one; 0 without labels."""
        return self.shards.classes

    @property
    def counts(self) -> dict[str, int]:
        """Samples by status, accepted ones first."""
        return {status: n for status, n in zip(STATUSES, self.shards.counts.tolist(), strict=False) if n}

    @property
    def notes(self) -> dict[str, int]:
        """Counts of things that are not samples."""
        notes = [remark.notes for remark in self.shards.remarks.values()]
        names = sorted({name for one in notes for name in one})
        return {name: sum(one.get(name, 0) for one in notes) for name in names}

    @property
    def fingerprint(self) -> str:
        """Hash over the ordered shards (name, size, samples): 128 bits in hex, independent of where the files are."""
        if "fingerprint" not in self._known:
            self._known["fingerprint"] = self.shards.fingerprint
        return self._known["fingerprint"]

    @property
    def selected_file(self) -> Path:
        """File of the rows that selections keep."""
        return Path(self.directory) / f"selected-{self.selection[:16]}.npz"

    @property
    def selected(self) -> SelectedRows:
        """The rows that selections keep.

        Raises:
            DataError: their file is missing or damaged.
        """
        if self._cache.selected is None:
            self._cache.selected = SelectedRows(self.selected_file)
        return self._cache.selected

    def sidecar(self, shard: int) -> Path:
        """Returns the path of a shard's sidecar."""
        return Path(self.sidecars) / self.shards[shard].sidecar

    def index(self, shard: int) -> ShardIndex:
        """Returns the index of a shard, with its rejected samples.

        Raises:
            DataError: the sidecar is missing, damaged, or not the one this manifest was built from.
        """
        path = self.sidecar(shard)
        stored = load_sidecar(path)
        index = stored.requiring(self.fields.require) if self.parent else stored
        if self.selection:
            index = index.choosing(_positions(stored, self.selected.rows(shard), path))
        if index.digest != self.shards[shard].digest:
            raise DataError(
                "sidecar belongs to another version of the shard",
                where=str(path),
                hint="Build the index again: fovea shards index SHARDS --check",
            )
        return index

    def rows(self, shard: int) -> Rows:
        """Returns the accepted samples of a shard; the most recently used shards are cached in memory.

        Raises:
            DataError: as :meth:`index`.
        """
        rows = self._cache.get(shard)
        if rows is None:
            index = self.index(shard)
            accepted = index.accepted
            if len(accepted) != self.sizes[shard]:
                raise DataError(
                    f"{len(accepted)} samples in the sidecar, {self.sizes[shard]} in the manifest",
                    where=str(self.sidecar(shard)),
                    hint="Build the index again: fovea shards index SHARDS --check",
                )
            partly = len(accepted) < len(index.keys)
            columns = {name: column[accepted] if partly else column for name, column in index.columns.items()}
            rows = Rows(index.keys.take(accepted), columns)
            self._cache.add(shard, rows, sum(column.nbytes for column in columns.values()) + rows.keys.nbytes)
        return rows

    def column(self, shard: int, name: str) -> NDArray[Any]:
        """Returns one column of a shard's accepted samples, ``[samples]``; names as in a sidecar."""
        return self.rows(shard).columns[name]

    def ids(self, positions: NDArray[np.int64] | None = None) -> NDArray[np.uint64]:
        """Returns the numbers of samples, uint64.

        Args:
            positions: positions in storage order, ``[n]``; by default of all samples.
        """
        ends = np.cumsum(self.sizes)
        positions = np.arange(self.total) if positions is None else np.asarray(positions)
        shards = np.searchsorted(ends, positions, side="right")
        rows = positions - (ends - self.sizes)[shards] if len(ends) else positions
        return (shards.astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64)

    def save(self, directory: str | Path) -> Manifest:
        """Writes the table under its version's name, unless it is there, and makes ``manifest.npz`` a link to it.

        Returns:
            The manifest mapped from that file.
        """
        folder = Path(directory)
        version = self.shards.version
        up = _up(folder, self.sidecars)
        document = Meta(self.fingerprint, self.shards.checksum, version, self.fields, self.parent, up, self.selection)
        name = f"manifest-{version[:16]}.npz"
        try:
            table, meta = ShardTable.open(folder / name)
            same = meta == document
        except DataError:
            same = False
        if not same:
            self.shards.save(folder / name, document)
            table, meta = ShardTable.open(folder / name)
        _point(folder / FILE, name)
        return _of(directory, table, meta, self.sidecars)

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Maps ``manifest.npz``.

        Raises:
            DataError: it is missing, damaged or of another format.
        """
        folder = Path(directory)
        if not (folder / FILE).exists() and (folder / "manifest.json").exists():
            return _old(folder)
        table, meta = ShardTable.open(folder / FILE)
        sidecars = folder.absolute()
        for _ in range(min(meta.up, _MAX_UP)):
            sidecars = sidecars.parent
        return _of(directory, table, meta, str(sidecars / SIDECARS))

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


def _of(directory: str | Path, table: ShardTable, meta: Meta, sidecars: str) -> Manifest:
    manifest = Manifest(str(directory), table, meta.fields, sidecars, meta.parent, meta.selection)
    manifest._known["fingerprint"] = meta.fingerprint
    return manifest


def _positions(stored: ShardIndex, rows: NDArray[np.uint32], path: Path) -> NDArray[np.int64]:
    accepted = stored.accepted
    if len(rows) and int(rows[-1]) >= len(accepted):
        raise DataError(
            f"a selected row {int(rows[-1])} does not exist: the shard has {len(accepted)} samples",
            where=str(path),
            hint="Build the index again: fovea shards index SHARDS --check",
        )
    return accepted[rows]


def _point(link: Path, name: str) -> None:
    """Lets ``manifest.npz`` be the file of this version; older ones stay for processes that have them, the newest eight."""
    if link.is_symlink() and os.readlink(link) == name:
        return
    temporary = link.with_name(f".{link.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.symlink_to(name)
    except OSError:  # a file system without links
        shutil.copyfile(link.with_name(name), temporary)
    temporary.replace(link)
    versions = sorted(link.parent.glob("manifest-*.npz"), key=lambda path: path.stat().st_mtime_ns)
    for old in versions[:-_VERSIONS]:
        if old.name != name:
            old.unlink(missing_ok=True)


def _up(directory: Path, sidecars: str) -> int:
    """Levels from a manifest's directory up to the parent of the sidecars; 0 if they are elsewhere."""
    parents = [directory.absolute(), *directory.absolute().parents]
    parent = Path(sidecars).absolute().parent
    return parents.index(parent) if parent in parents[: _MAX_UP + 1] else 0


@dataclass(frozen=True)
class _OldDocument:
    """Content of the ``manifest.json`` of an earlier version."""

    fingerprint: str
    fields: Fields
    shards: list[Shard]


_OLD = TypeAdapter(_OldDocument)


def _old(folder: Path) -> Manifest:
    """Reads the ``manifest.json`` of an earlier version; its sidecars have other names, so only the summaries can be used.

    Raises:
        DataError: it is damaged or of another format.
    """
    path, hint = folder / "manifest.json", "Build the index again"
    try:
        document = read_json(path, limit=_OLD_LIMIT)
        if isinstance(document, dict) and document.get("format") != FORMAT:
            raise DataError(
                f"has format {document.get('format')}, this version of fovea reads {FORMAT}", where=str(path), hint=hint
            )
        checked = _OLD.validate_python(document)
        manifest = Manifest(str(folder), ShardTable.of(checked.shards, checked.fields), checked.fields)
    except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = printable(first_line(error), limit=160)
        raise DataError(f"manifest is damaged ({reason})", where=str(path), hint=hint) from error
    if manifest.fingerprint != document["fingerprint"]:
        raise DataError("manifest was edited: its fingerprint does not match its shards", where=str(path), hint=hint)
    return manifest


def _content(shard: Shard) -> tuple[int, str]:
    return shard.size, shard.digest


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
