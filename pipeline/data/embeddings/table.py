"""The Parquet file of one shard's embeddings: its columns, how it is written, how it is read without trusting it.

Values are stored plain and uncompressed, since embeddings hardly compress: a file's size bounds what reading it can need, and
equal values give equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.embeddings.document import EmbeddedShard, EmbeddingSpec
from pipeline.data.storage.local import naming
from pipeline.data.storage.parquet import open_pyarrow
from pipeline.errors import DataError
from pipeline.untrusted import open_regular, printable

Columns = Mapping[str, Any]
DIGEST_BYTES = 16
ROW_GROUP = 8192  # rows
_INTEGERS = {
    "shard": "int32",
    "row": "int32",
    "patch": "int32",
    "width": "int32",
    "height": "int32",
    "caption_bytes": "int32",
    "image_bytes": "int32",
}
_LABELS = {"label": "int64"}
_LIMIT = 16 << 20  # bytes of a text in a file's metadata
_HINT = "Restore the file, or embed the shards again into another folder"


def column_names(spec: EmbeddingSpec) -> tuple[str, ...]:
    """Names of the columns, in their order."""
    patch = ("patch",) if spec.patches else ()
    return ("key", "shard", "row", *patch, "embedding", "width", "height", "label", "caption_bytes", "image_bytes", "digest")


def schema(spec: EmbeddingSpec, pyarrow: Any) -> Any:
    """The Arrow schema; no column has nulls."""
    number = pyarrow.float16() if spec.dtype == "float16" else pyarrow.float32()
    types = {
        "key": pyarrow.string(),
        "embedding": pyarrow.list_(pyarrow.field("element", number, nullable=False), spec.dim),
        "digest": pyarrow.binary(DIGEST_BYTES),
        **{name: getattr(pyarrow, kind)() for name, kind in (_INTEGERS | _LABELS).items()},
    }
    return pyarrow.schema([pyarrow.field(name, types[name], nullable=False) for name in column_names(spec)])


def arrow_table(spec: EmbeddingSpec, columns: Columns, pyarrow: Any, where: str) -> Any:
    """The Arrow table of some rows.

    Args:
        spec: what is embedded.
        columns: by name: ``embedding [n, dim]``, ``key`` a list of texts, ``digest`` bytes ``[n, 16]`` uint8, integers ``[n]``.
        pyarrow: the module.
        where: the file, for messages.

    Raises:
        DataError: numbers that are not finite, also after rounding to the stored type.
    """
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(columns["embedding"], dtype=spec.dtype)
    _check_finite(values, where)
    kinds = schema(spec, pyarrow)
    arrays = []
    for name in kinds.names:
        kind = kinds.field(name).type
        if name == "embedding":
            flat = pyarrow.array(values.reshape(-1), type=kind.value_type)
            arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, type=kind))
        elif name == "key":
            arrays.append(pyarrow.array([text_of(key) for key in columns["key"]], type=kind))
        elif name == "digest":
            digests = np.ascontiguousarray(columns["digest"], dtype=np.uint8)
            arrays.append(pyarrow.FixedSizeBinaryArray.from_buffers(kind, len(digests), [None, pyarrow.py_buffer(digests)]))
        else:
            arrays.append(pyarrow.array(np.asarray(columns[name]), type=kind))
    return pyarrow.Table.from_arrays(arrays, schema=kinds)


def text_of(key: str) -> str:
    """A sample's key as Parquet can hold it: bytes that are not UTF-8 are escaped."""
    return key.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def writer(path: Path, spec: EmbeddingSpec, metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Writes a file under a temporary name and renames it at the end; yields a ``pyarrow.parquet.ParquetWriter``.

    Args:
        path: of the file.
        spec: what is embedded.
        metadata: stored in the file.
    """
    pyarrow, parquet = open_pyarrow(str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with (
            naming(path),
            open(temporary, "wb") as file,
            parquet.ParquetWriter(
                file,
                schema(spec, pyarrow).with_metadata(dict(metadata or {})),
                version="2.6",
                compression="NONE",
                use_dictionary=False,
                write_statistics=["shard", "row"],
                data_page_version="1.0",
                column_encoding="PLAIN",
            ) as out,
        ):
            yield out
            out.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, spec: EmbeddingSpec, parts: Iterator[Columns] | Sequence[Columns]) -> int:
    """Writes one file from columns of consecutive rows; returns the number of rows."""
    pyarrow, _ = open_pyarrow(str(path))
    count = 0
    with writer(path, spec) as out:
        for part in parts:
            table = arrow_table(spec, part, pyarrow, str(path))
            out.write_table(table, row_group_size=ROW_GROUP)
            count += len(table)
    return count


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, hex."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(
    path: Path, spec: EmbeddingSpec, about: EmbeddedShard, number: int, columns: Sequence[str], *, rows: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yields some columns of a file, in pieces of at most ``rows`` rows.

    Args:
        path: of the file.
        spec: what is embedded.
        about: the shard.
        number: of the shard.
        columns: their names.
        rows: of a piece.

    Raises:
        DataError: the file does not exist, does not fit its description, or holds numbers that are not finite.
    """
    pyarrow, parquet = open_pyarrow(str(path))
    where = printable(str(path))
    count = 0
    try:
        descriptor = open_regular(path, where=where)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=where, hint=_HINT) from error
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != about.bytes:
            raise DataError(f"has {size} bytes, and {about.bytes} in the description", where=where, hint=_HINT)
        try:
            file = parquet.ParquetFile(
                stream, thrift_string_size_limit=_LIMIT, thrift_container_size_limit=1 << 22, memory_map=False
            )
            _check_layout(file, spec, about, size, pyarrow, where)
            for batch in file.iter_batches(batch_size=rows, columns=list(columns), use_threads=False):
                out = {name: _values(batch.column(name), name, spec) for name in columns}
                _check_values(out, spec, about, number, count, where)
                count += len(batch)
                if count > about.rows:
                    break
                yield out
        except DataError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError, TypeError, MemoryError) as error:
            raise DataError(f"is not readable Parquet ({printable(str(error), limit=160)})", where=where, hint=_HINT) from error
    if count != about.rows:
        raise DataError(f"has {count} rows, and {about.rows} in the description", where=where, hint=_HINT)


def _check_layout(file: Any, spec: EmbeddingSpec, about: EmbeddedShard, size: int, pyarrow: Any, where: str) -> None:
    """Checks the file's own description, before memory is allocated by it."""
    meta = file.metadata
    if not file.schema_arrow.equals(schema(spec, pyarrow), check_metadata=False):
        shown = printable(str(file.schema_arrow.remove_metadata()).replace("\n", ", "), limit=200)
        raise DataError(f"has other columns than described ({shown})", where=where, hint=_HINT)
    width = spec.dim * np.dtype(spec.dtype).itemsize
    if meta.num_rows != about.rows or about.rows * width > size:
        raise DataError(f"claims {meta.num_rows} rows instead of {about.rows}", where=where, hint=_HINT)
    total = 0
    for group in range(meta.num_row_groups):
        held = meta.row_group(group)
        total += held.num_rows
        for index in range(held.num_columns):
            chunk = held.column(index)
            values = held.num_rows * (spec.dim if chunk.path_in_schema.startswith("embedding.") else 1)
            plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
            if not plain or chunk.num_values != values or not 0 <= chunk.total_compressed_size <= size:
                raise DataError(f"its column {chunk.path_in_schema} is not stored plainly", where=where, hint=_HINT)
    if total != about.rows:
        raise DataError(f"its row groups have {total} rows instead of {about.rows}", where=where, hint=_HINT)


def _values(array: Any, name: str, spec: EmbeddingSpec) -> NDArray[Any]:
    if array.null_count:
        raise ValueError(f"{name} has nulls")
    if name == "embedding":
        flat = array.flatten()
        if flat.null_count:
            raise ValueError("embedding has nulls")
        return flat.to_numpy(zero_copy_only=False).reshape(len(array), spec.dim)
    if name == "digest":
        data = array.buffers()[1]
        start = array.offset * DIGEST_BYTES
        held = np.frombuffer(data, dtype=np.uint8)[start : start + len(array) * DIGEST_BYTES]
        return held.reshape(len(array), DIGEST_BYTES)
    if name == "key":
        return np.array(array.to_pylist(), dtype=object)
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def _check_values(
    columns: Mapping[str, NDArray[Any]], spec: EmbeddingSpec, about: EmbeddedShard, number: int, first: int, where: str
) -> None:
    """Checks one piece's values; the order of rows over pieces is checked by their bounds alone."""
    if "embedding" in columns:
        _check_finite(columns["embedding"], where)
    least = {"shard": number, "row": 0, "patch": 0, "width": 1, "height": 1, "label": -1, "caption_bytes": 0, "image_bytes": 0}
    most = {"shard": number, "row": about.samples - 1}
    for name, values in columns.items():
        low, high = least.get(name), most.get(name)
        if len(values) and ((low is not None and values.min() < low) or (high is not None and values.max() > high)):
            raise DataError(f"column {name} has a value out of range behind row {first}", where=where, hint=_HINT)
    if "row" in columns:
        steps = np.diff(columns["row"])
        if len(steps) and steps.min() < (0 if spec.patches else 1):
            raise DataError(f"column row is not ascending behind row {first}", where=where, hint=_HINT)
        if "patch" in columns and (np.diff(columns["patch"])[steps == 0] <= 0).any():
            raise DataError(f"column patch is not ascending behind row {first}", where=where, hint=_HINT)


def _check_finite(values: NDArray[Any], where: str) -> None:
    if bad := int((~np.isfinite(values).all(axis=-1)).sum()):
        raise DataError(
            f"{bad} of {len(values)} embeddings are not finite",
            where=where,
            hint="Check the weights; with fp16, embed as fp32: numbers beyond 65504 do not fit",
        )
