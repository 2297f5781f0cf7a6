"""Tables that name pictures: ``.csv``, ``.tsv``, ``.jsonl`` and ``.parquet``.

Columns: ``path`` (relative to the table), and if wanted ``label`` (number or name), ``caption`` (text, or a list of texts) or
``captions``. Every other column is kept for the sample's ``.json`` member.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
_OWN = ("path", "label", "caption", "captions")


@dataclass(frozen=True)
class Row:
    """One picture.

    Attributes:
        path: as the table says it.
        label: number or name, None if the row has none.
        captions: texts, none of them empty.
        extra: the other columns, fit for JSON.
    """

    path: str
    label: str | None
    captions: tuple[str, ...]
    extra: dict[str, Any]


def rows(table: Path) -> Iterator[Row]:
    """The rows of a table.

    Raises:
        DataError: it cannot be read, or a row has no path.
    """
    kind = table.suffix.lower()
    if kind not in KINDS:
        raise DataError("is no table", where=str(table), hint=f"Give a file that ends in one of {', '.join(KINDS)}.")
    reader = {".jsonl": _jsonl, ".parquet": _parquet}.get(kind, _csv)
    try:
        for place, row in reader(table):
            yield _row(place, row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read ({error})", where=str(table), hint="Give a table in UTF-8.") from error


def _row(place: str, row: dict[str, Any]) -> Row:
    path, label = row.get("path"), row.get("label")
    if _blank(path):
        raise DataError("has no path", where=place, hint="Give every row the path of a picture.")
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # a column of whole numbers with gaps arrives as floats
    captions: list[str] = []
    for said in (row.get("caption"), row.get("captions")):
        captions += [str(text) for text in (said if isinstance(said, (list, tuple)) else [said]) if not _blank(text)]
    extra = {name: _plain(value) for name, value in row.items() if isinstance(name, str) and name not in _OWN}
    return Row(str(path), None if _blank(label) else str(label).strip(), tuple(dict.fromkeys(captions)), extra)


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value)


def _csv(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
        _check_columns(table, reader.fieldnames or ())
        for row in reader:
            yield f"{table}:{reader.line_num}", row


def _jsonl(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            place = f"{table}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"is no JSON ({error})", where=place, hint="Write one object a line.") from error
            if not isinstance(row, dict) or _blank(row.get("path")):
                raise DataError("has no path", where=place, hint='Write lines such as {"path": "a.jpg"}.' + _download(row))
            yield place, row


def _parquet(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        hint = "Install it (pip install pyarrow), or save the table as .csv or .jsonl."
        raise DataError("reading .parquet needs pyarrow", where=str(table), hint=hint) from error
    try:
        with parquet.ParquetFile(table) as file:
            _check_columns(table, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{table}: row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"is no Parquet file ({error})", where=str(table), hint="Write or copy it again.") from error


def _check_columns(table: Path, names: Any) -> None:
    if "path" not in names:
        hint = "Name the columns path, caption, label in the first line." + _download(names)
        raise DataError("has no column 'path'", where=str(table), hint=hint)


def _download(names: Any) -> str:
    if isinstance(names, (dict, list, tuple)) and "url" in names:
        return " Pictures behind a url must be fetched first: img2dataset does it, and its output can be packed."
    return ""
