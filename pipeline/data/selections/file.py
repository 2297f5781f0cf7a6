"""Reads and writes selections: Parquet files of shard, row and weight, bound to an index.

A selection lists the samples that are used and how often each occurs in an epoch. The columns ``shard`` (int32), ``row`` (int64)
and ``weight`` (float64) are sorted by shard and row; other columns are ignored. The key-value metadata ``fovea.selection`` is a
JSON object: the fingerprint of the index, how the selection was made, counts, and a SHA-256 over all of it and the columns.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from pipeline.data.index.selected import MAX_WEIGHT, UNIT
from pipeline.data.storage.parquet import open_pyarrow
from pipeline.errors import DataError
from pipeline.runtime.locks import lock
from pipeline.untrusted import open_regular, parse_json, printable

_KEY = b"fovea.selection"
_FORMAT = 1
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAX_META = 16 << 20  # bytes
_CHUNK = 1 << 18  # rows that are read and written at a time
_HINT = "Make the selection again"
_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
_Text = Annotated[str, Field(max_length=1 << 16)]


@dataclass(frozen=True)
class SelectionInfo:
    """What a selection says about itself.

    Attributes:
        fingerprint: of the index that its shards and rows belong to.
        samples: samples that it selects.
        total: accepted samples of the index.
        weight: sum of the weights: samples of an epoch.
        sha256: over the columns and all other values here, hex.
        made: how: command, inputs and their hashes, seed, thresholds.
        counts: samples by the reason why they were kept or left out.
    """

    fingerprint: _Text
    samples: _Count
    total: _Count
    weight: float
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    made: dict[str, Any] = field(default_factory=dict)
    counts: dict[_Text, _Count] = field(default_factory=dict)


_INFO = TypeAdapter(SelectionInfo)


@dataclass(frozen=True)
class Part:
    """The selected samples of one shard.

    Attributes:
        shard: number of the shard in the index.
        rows: rows among its accepted samples, ascending, int64 ``[n]``.
        weights: how often each occurs in an epoch, float64 ``[n]``.
    """

    shard: int
    rows: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def units(self) -> NDArray[np.uint32]:
        """The weights in units of 1/65536, ``[n]``."""
        return np.rint(self.weights * UNIT).astype(np.uint32)


class Selection:
    """A selection file; its rows are read when they are asked for.

    Args:
        path: the file.

    Raises:
        DataError: it is no selection, or pyarrow is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._where = printable(str(self.path))
        try:
            with self._opened() as file:
                meta = (file.schema_arrow.metadata or {}).get(_KEY) or (file.metadata.metadata or {}).get(_KEY)
                names = set(file.schema_arrow.names)
        except OSError as error:
            raise DataError(
                f"the selection cannot be read ({error.strerror or error})", where=self._where, hint="Check data.selection"
            ) from error
        if meta is None or len(meta) > _MAX_META or not {"shard", "row", "weight"} <= names:
            raise DataError(
                "the file must be a selection",
                where=self._where,
                hint="Give a file that fovea shards dedup, balance, retrieve or select wrote",
            )
        try:
            document = parse_json(meta)
            if document.pop("format", None) != _FORMAT:
                raise ValueError("another format")
            self.info = _INFO.validate_python(document)
            if self.info.samples > self.info.total:
                raise ValueError(f"{self.info.samples} samples of {self.info.total}")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(str(error).splitlines()[0] if str(error) else type(error).__name__) from error

    def verify(self) -> None:
        """Reads everything.

        Raises:
            DataError: as :meth:`parts`.
        """
        for _ in self.parts():
            pass

    def parts(self) -> Iterator[Part]:
        """Yields the selected samples shard by shard, in order; verifies everything on the way.

        Raises:
            DataError: rows are not in order or occur twice, a weight is invalid, or the checksum does not match.
        """
        signature, last, samples = _Signature(), (-1, -1), 0
        shard = -1  # the one that has begun
        rows: list[NDArray[np.int64]] = []
        weights: list[NDArray[np.float64]] = []
        for chunk_shards, chunk_rows, chunk_weights in self._chunks():
            if not len(chunk_shards):
                continue
            signature.update(chunk_shards, chunk_rows, chunk_weights)
            samples += len(chunk_shards)
            before = np.concatenate([[last[0]], chunk_shards[:-1]]), np.concatenate([[last[1]], chunk_rows[:-1]])
            later = (chunk_shards > before[0]) | ((chunk_shards == before[0]) & (chunk_rows > before[1]))
            if not later.all() or chunk_shards.min() < 0 or chunk_rows.min() < 0 or chunk_rows.max() >= 1 << 32:
                raise self._damaged("its rows must be in order, each once")
            if not (np.isfinite(chunk_weights) & (chunk_weights >= 0.5 / UNIT) & (chunk_weights <= MAX_WEIGHT)).all():
                raise self._damaged(f"weights must lie between 1/65536 and {MAX_WEIGHT:.0f}")
            if samples > self.info.samples:  # of a crafted file, before more than that is held
                break
            last = int(chunk_shards[-1]), int(chunk_rows[-1])
            for part in np.split(np.arange(len(chunk_shards)), np.flatnonzero(np.diff(chunk_shards)) + 1):
                number = int(chunk_shards[part[0]])
                if number != shard:
                    if rows:
                        yield Part(shard, np.concatenate(rows), np.concatenate(weights))
                    shard, rows, weights = number, [], []
                rows.append(chunk_rows[part])
                weights.append(chunk_weights[part])
        if rows:
            yield Part(shard, np.concatenate(rows), np.concatenate(weights))
        if samples != self.info.samples or signature.of(self.info) != self.info.sha256:
            raise self._damaged("its checksum does not match: the file was changed after it was made")

    def _chunks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
        pyarrow, _ = open_pyarrow(str(self.path))
        try:
            with self._opened() as file:
                for batch in file.iter_batches(batch_size=_CHUNK, columns=["shard", "row", "weight"]):
                    if any(column.null_count for column in batch.columns):
                        raise ValueError("a value is missing")
                    shards, rows, weights = (
                        batch.column(name).to_numpy(zero_copy_only=False) for name in ("shard", "row", "weight")
                    )
                    if shards.dtype.kind not in "iu" or rows.dtype.kind not in "iu" or weights.dtype.kind not in "fiu":
                        raise ValueError("a column has an unexpected type")
                    yield shards.astype(np.int64), rows.astype(np.int64), weights.astype(np.float64)
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            raise self._damaged(str(error).splitlines()[0] if str(error) else type(error).__name__) from error

    def _opened(self) -> Any:
        pyarrow, parquet = open_pyarrow(str(self.path))
        os.close(open_regular(self.path))
        try:
            return parquet.ParquetFile(str(self.path))
        except (pyarrow.ArrowException, ValueError, MemoryError) as error:
            raise self._damaged(str(error).splitlines()[0] if str(error) else type(error).__name__) from error

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"the selection is damaged ({printable(reason, limit=160)})", where=self._where, hint=_HINT)


def describe(files: Sequence[Path]) -> str:
    """Returns one line about selections: how many samples each has, and which command made it. Empty without any."""
    lines = []
    for file in files:
        info = Selection(file).info
        weight = "" if info.weight == info.samples else f", {info.weight:.0f} in an epoch"
        made = printable(str(info.made.get("command", "by hand")), limit=60)
        lines.append(f"{file.name}: {info.samples} of {info.total} samples{weight} ({made})")
    return "; ".join(lines)


def write_selection(
    path: str | os.PathLike[str],
    parts: Iterable[Part],
    *,
    fingerprint: str,
    total: int,
    made: dict[str, Any],
    counts: dict[str, int] | None = None,
) -> SelectionInfo:
    """Writes a selection atomically.

    Args:
        path: the file, by convention ``*.parquet``.
        parts: the selected samples of each shard, in order.
        fingerprint: of the index.
        total: accepted samples of the index.
        made: how it was made, JSON values.
        counts: samples by the reason why they were kept or left out; completed while ``parts`` is read.

    Raises:
        DataError: nothing is selected, or the file cannot be written.
    """
    target = Path(path)
    pyarrow, parquet = open_pyarrow(str(target))
    schema = pyarrow.schema([("shard", pyarrow.int32()), ("row", pyarrow.int64()), ("weight", pyarrow.float64())])
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    signature, samples, weight = _Signature(), 0, 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        with _locked(temporary) as file, parquet.ParquetWriter(file, schema) as writer:
            for part in parts:
                if not len(part.rows):
                    continue
                if not ((part.weights * UNIT >= 0.5) & (part.weights <= MAX_WEIGHT)).all():
                    raise DataError(
                        f"a weight of shard {part.shard} does not lie between 1/65536 and {MAX_WEIGHT:.0f}",
                        where=printable(str(target)),
                        hint="Leave a sample out instead of giving it weight 0",
                    )
                shards = np.full(len(part.rows), part.shard, dtype=np.int64)
                rows, weights = part.rows.astype(np.int64), part.units / UNIT
                signature.update(shards, rows, weights)
                samples, weight = samples + len(rows), weight + int(part.units.sum(dtype=np.int64))
                columns = [shards.astype(np.int32), rows, weights]
                writer.write_table(pyarrow.table([pyarrow.array(column) for column in columns], schema=schema))
            if not samples:
                raise DataError("nothing would be selected", where=printable(str(target)), hint="Choose weaker limits")
            info = SelectionInfo(fingerprint, samples, total, weight / UNIT, "0" * 64, made, dict(counts or {}))
            info = SelectionInfo(**{**asdict(info), "sha256": signature.of(info)})
            writer.add_key_value_metadata({_KEY: json.dumps({"format": _FORMAT, **asdict(info)}, sort_keys=True).encode()})
            writer.close()
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
    except OSError as error:
        raise DataError(
            f"the selection cannot be written ({os.strerror(error.errno) if error.errno else error})",
            where=printable(str(target)),
            hint="Free space there, or choose another file" if error.errno in _FULL else "Choose another file",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return info


def _locked(path: Path) -> IO[bytes]:
    """Opens a temporary file that is locked while this process lives."""
    while True:
        file = path.open("wb")
        with contextlib.suppress(BlockingIOError):
            lock(file.fileno(), path, wait=False)
            if os.fstat(file.fileno()).st_nlink:
                return file
        file.close()


def _remove_leftovers(target: Path) -> None:
    """Removes temporary files of processes that were killed, whose locks are free."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            if lock(file.fileno(), path, wait=False):
                path.unlink()


class _Signature:
    """SHA-256 over the columns of a selection and what it says about itself."""

    def __init__(self) -> None:
        self._columns = [hashlib.sha256() for _ in range(3)]

    def update(self, shards: NDArray[np.int64], rows: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
        for digest, column, kind in zip(self._columns, (shards, rows, weights), ("<i8", "<i8", "<f8"), strict=True):
            digest.update(np.ascontiguousarray(column, dtype=kind).tobytes())

    def of(self, info: SelectionInfo) -> str:
        document = {name: value for name, value in asdict(info).items() if name != "sha256"}
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode("utf-8", "surrogatepass"))
        for column in self._columns:
            digest.update(column.digest())
        return digest.hexdigest()
