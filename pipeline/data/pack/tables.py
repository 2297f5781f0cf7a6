"""Reads tables that name images: ``.csv``, ``.tsv``, ``.jsonl`` and ``.parquet``, strictly.

Columns: ``path``, and optionally ``label`` (number or name), ``caption`` (a string, or a list of strings) or ``captions``. Every
other column is kept for the sample's ``.json`` member. A row that does not fit its header, a line that is not JSON, an unclosed
quote or invalid text raises an error with the line's number: nothing is guessed, nothing is truncated.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.index.captions import REPLACED, clean_text, encoding_of
from pipeline.data.pack.delimited import read_delimited
from pipeline.data.storage.parquet import open_pyarrow
from pipeline.errors import DataError
from pipeline.untrusted import hide_secrets, open_regular, printable

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
_OWN = ("path", "label", "caption", "captions")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FETCH = "Images behind a url must be fetched first: img2dataset does it, and its output can be packed"
_LIST = re.compile(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", re.DOTALL)
INSTALL_PYARROW = "Install it: pip install 'fovea[parquet]', or save the table as .csv or .jsonl"
_MAX_LINE = 64 << 20  # maximum characters of a line of JSON
_MAX_DEPTH = 64  # maximum depth of lists and objects in a column


@dataclass(frozen=True)
class Row:
    """One row of a table, naming an image.

    Attributes:
        path: as in the table.
        label: number, name or any other value; see :func:`pipeline.data.index.labels.read_label`.
        captions: non-empty texts.
        extra: the other columns, as JSON values.
        where: file and line or row.
        notes: ``caption_replaced`` or ``text_replaced`` if lone surrogates were replaced in it; ``caption_list`` for a caption
            such as ``['a dog', 'a cat']``, a list written as one string.
    """

    path: str
    label: Any
    captions: tuple[str, ...]
    extra: dict[str, Any]
    where: str = ""
    notes: tuple[str, ...] = ()


def rows(table: Path) -> Iterator[Row]:
    """Yields the rows of a table. Some errors are raised only after the last row.

    Raises:
        DataError: it cannot be read, has no column ``path``, or a row does not fit.
    """
    for position, row in records(table):
        yield _row(position, row)


def records(table: Path, column: str = "path") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the position and the values of each row. Some errors are raised only after the last row.

    Args:
        table: the file.
        column: a column that it must have.

    Raises:
        DataError: it cannot be read, has no such column, or a row does not fit.
    """
    kind = table.suffix.lower()
    if kind not in KINDS:
        raise DataError("is not a table", where=str(table), hint=f"Give a file that ends in one of {', '.join(KINDS)}")
    reader = {".jsonl": _jsonl, ".parquet": _parquet}.get(kind, _csv)
    try:
        yield from reader(table, column)
    except UnicodeError as error:
        raise _no_text(table) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(table), hint="Check the path") from error


def _row(position: str, row: dict[str, Any]) -> Row:
    path = row.get("path")
    if _blank(path):
        raise DataError("has no path", where=position, hint="Give every row the path of an image")
    if not isinstance(path, str) or "\0" in path:
        shown = repr(path) if isinstance(path, str) else type(path).__name__
        raise DataError(
            f"the path must be text, not {printable(shown, limit=60)}", where=position, hint="Write the path of a file"
        )
    if _ADDRESS.match(path):
        hint = "Write the path without file://" if path.lower().startswith("file:") else _FETCH
        shown = printable(hide_secrets(path), limit=80)
        raise DataError(f"the path must be a file, not the address {shown}", where=position, hint=hint)
    notes: list[str] = []
    captions: list[str] = []
    for name in ("caption", "captions"):
        value = row.get(name)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if _blank(text):
                continue
            if isinstance(text, bool) or not isinstance(text, (str, int, float)):
                hint = "Give a string or a list of strings"
                raise DataError(f"the {name} must be text, not {type(text).__name__}", where=position, hint=hint)
            clean, replaced = clean_text(str(text))
            captions.append(clean)
            notes += [REPLACED] * replaced + ["caption_list"] * bool(_LIST.fullmatch(clean))
    extra = {clean_text(name)[0]: _plain(value, position, name, notes) for name, value in row.items() if name not in _OWN}
    label = row.get("label")
    return Row(path, label, tuple(dict.fromkeys(captions)), extra, position, tuple(dict.fromkeys(notes)))


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def _plain(value: Any, position: str, name: str, notes: list[str], depth: int = 0) -> Any:
    """Converts a value to JSON types."""
    if depth > _MAX_DEPTH:
        hint = "Flatten it, or leave the column out of the table"
        raise DataError(f"column {printable(name, limit=60)!r} is nested too deeply", where=position, hint=hint)
    if isinstance(value, (bytes, bytearray, memoryview)):
        hint = "Leave the column out of the table: only text, numbers and lists of them are kept"
        raise DataError(f"column {printable(name, limit=60)!r} contains bytes", where=position, hint=hint)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        clean, replaced = clean_text(value)
        notes += ["text_replaced"] * replaced
        return clean
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict):
        return {clean_text(str(key))[0]: _plain(inner, position, name, notes, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, position, name, notes, depth + 1) for inner in value]
    return str(value)


def _csv(table: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(table) as file:
        names, lines = read_delimited(file, str(table), tabs_first=table.suffix.lower() == ".tsv", column=column)
        _check_columns(table, names, column)
        for line, fields in lines:
            yield f"{table}:{line}", dict(zip(names, fields, strict=True))


def _open(table: Path) -> Any:
    """Opens the table as text, with the encoding of its byte order mark; only line feeds and carriage returns end a line."""
    descriptor = open_regular(table, where=str(table))
    try:
        start = os.pread(descriptor, 4, 0)
        return os.fdopen(descriptor, encoding=encoding_of(start), errors="strict", newline="")
    except BaseException:
        os.close(descriptor)
        raise


def _no_text(table: Path) -> DataError:
    """Returns an error that names the first line that is not valid text."""
    with table.open("rb") as file:
        start = file.read(4096)
        encoding = encoding_of(start)
        if encoding not in ("utf-8", "utf-8-sig"):
            return DataError(f"is not valid {encoding.upper()}", where=str(table), hint="Save the table in UTF-8")
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                hint = "Save the table in UTF-8, for instance: iconv -f latin1 -t utf-8 OLD > NEW"
                return DataError(f"is not UTF-8 (byte 0x{line[error.start]:02x})", where=f"{table}:{number}", hint=hint)
    return DataError("is not UTF-8", where=str(table), hint="Save the table in UTF-8")


def _jsonl(table: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    hint = f'Write lines such as {{"{column}": "a"}}'
    with _open(table) as file:
        for number, line in enumerate(_lines(file, table), start=1):
            position = f"{table}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else printable(str(error), limit=120)
                raise DataError(f"is not JSON ({reason})", where=position, hint="Write one JSON object per line") from error
            if not isinstance(row, dict):
                raise DataError(f"must be an object, not {type(row).__name__}", where=position, hint=hint)
            _check_spelling(row, position)
            if _blank(row.get(column)):
                raise DataError(f"has no {column}", where=position, hint=hint + _download(row))
            yield position, row


def _lines(file: Any, table: Path) -> Iterator[str]:
    """Yields lines that end in a line feed alone: a carriage return inside a line is white space in JSON."""
    rest = ""
    while chunk := file.read(1 << 20):
        *complete, rest = (rest + chunk).split("\n")
        yield from complete
        if len(rest) > _MAX_LINE:
            raise DataError(
                f"a line has more than {_MAX_LINE} characters", where=str(table), hint="Write one JSON object per line"
            )
    if rest:
        yield rest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return out


def _parquet(table: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    pyarrow, parquet = open_pyarrow(str(table), hint=INSTALL_PYARROW)
    os.close(open_regular(table, where=str(table)))
    number = 0
    try:
        with parquet.ParquetFile(table) as file:
            schema = file.schema_arrow
            _check_columns(table, schema.names, column)
            kind = schema.field(column).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not any(check(kind) for check in (pyarrow.types.is_string, pyarrow.types.is_large_string, _string_view(pyarrow))):
                raise DataError(f"column {column!r} must contain text, not {kind}", where=str(table), hint="Write it as strings")
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{table}: row {number}", row
    except UnicodeDecodeError as error:
        hint = "Write its strings in UTF-8"
        raise DataError("a string is not UTF-8", where=f"{table}: after row {number}", hint=hint) from error
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError, TypeError, MemoryError) as error:
        where = f"{table}: after row {number}" if number else str(table)
        reason = printable(str(error), limit=200)
        raise DataError(f"is not a Parquet file ({reason})", where=where, hint="Write or copy the file again") from error


def _string_view(pyarrow: Any) -> Any:
    return getattr(pyarrow.types, "is_string_view", lambda kind: False)


def _check_columns(table: Path, names: Any, column: str) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        hint = "Give every column a unique name"
        raise DataError(
            f"has {len(twice)} column names twice, such as {printable(twice[0], limit=60)!r}", where=str(table), hint=hint
        )
    _check_spelling(names, str(table))
    if column not in names:
        shown = ", ".join(printable(str(name), limit=30) for name in list(names)[:8])
        usual = "path, caption, label" if column == "path" else column
        hint = f"Name the columns {usual} in the first line{_download(names)}"
        raise DataError(f"has no column {column!r} (it has: {shown or 'none'})", where=str(table), hint=hint)


def _check_spelling(names: Iterable[str], where: str) -> None:
    """Rejects ``Label`` for ``label``, which would otherwise silently be kept as an extra column."""
    columns = tuple(names)
    for name in columns:
        own = name.strip().lower()
        if own in _OWN and own not in columns:
            shown = printable(name, limit=60)
            raise DataError(f"column {shown!r} must be spelled {own!r}", where=where, hint="Rename the column")


def _download(names: Iterable[Any]) -> str:
    if any(str(name).strip().lower() == "url" or _ADDRESS.match(str(name)) for name in names):
        return f". {_FETCH}"
    return ""
