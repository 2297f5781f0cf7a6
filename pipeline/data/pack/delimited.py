"""Reads CSV and TSV strictly: every row must have the header's number of fields, and every quote must be closed.

CSV is read with quotes (RFC 4180). Tables separated by tabs or bars (``|``) are mostly written without: there, quotes count as
quoting only if every field that begins with one also ends with one, and as plain characters otherwise.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DataError
from pipeline.untrusted import printable

TAB = "\t"
DELIMITERS = ",;\t|"  # the one that yields a column ``path`` in the header is used
MAX_FIELD = 16 << 20  # characters
_NAMED = 5  # maximum number of lines named in a message
_CLOSE = re.compile(r'[^"]*(?:""[^"]*)*"(?!")')  # up to the quote that ends a field

Records = Iterator[tuple[int, list[str]]]


def read_delimited(file: Any, where: str, *, tabs_first: bool, column: str = "path") -> tuple[list[str], Records]:
    """Reads the header and the rows of a table.

    Args:
        file: seekable text, opened with ``newline=""``.
        where: the file, for messages.
        tabs_first: try tabs first, as for ``.tsv``; otherwise commas. In both cases the delimiter is the one that yields
            ``column`` in the header.
        column: name of the column that every row has.

    Returns:
        Column names, stripped; and (number of its first line, fields) of each row that is not blank.

    Raises:
        DataError: immediately or from the iterator, with the lines: rows of another length, an unclosed quote, a field of more
            than 16 million characters, line separators or quotes that do not fit.
    """
    file.seek(0)
    header = file.readline(MAX_FIELD)
    if "\0" in header:
        raise DataError(
            "contains NUL characters", where=f"{where}:1", hint="Save it as text in UTF-8, not UTF-16 without a byte order mark"
        )
    delimiters = f"\t{DELIMITERS.replace(TAB, '')}" if tabs_first else DELIMITERS
    delimiter = next((one for one in delimiters if column in _names(header, one)), delimiters[0])
    columns = _names(header, delimiter)
    shape = _Shape(delimiter, len(columns), columns.index(column) if column in columns else 0)
    quoted = delimiter not in "\t|" or _is_quoted(file, shape)
    spaced = len(columns) > 1 and all(part.startswith(" ") for part in header.split(delimiter)[1:])
    records = _records(file, where, shape, quoted, spaced=spaced)
    first = next(records, None)
    names = [name.strip() for name in first[1]] if first is not None else []
    return names, _fitting(records, len(names), where)


@dataclass(frozen=True)
class _Shape:
    """The delimiter, the number of columns and the position of the path column."""

    delimiter: str
    columns: int
    path: int

    def is_row(self, line: str, like: str = "") -> bool:
        """Whether a line by itself could be a row: the right number of fields, and an unquoted path in its column.

        Args:
            line: with or without its line ending.
            like: a path that the line's must resemble in extension, number of directories, and white space; empty for any.
        """
        parts = line.rstrip("\r\n").split(self.delimiter)
        plain = len(parts) == self.columns and not any('"' in part for part in parts[: self.path + 1])
        if not plain or not like:
            return plain
        path, like = parts[self.path].strip(), like.strip()
        alike = path.count("/") == like.count("/") and (" " in path) <= (" " in like)
        return alike and path.endswith(os.path.splitext(like)[1])


def _names(header: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"') for name in header.strip("\r\n").split(delimiter)]


def _is_quoted(file: Any, shape: _Shape) -> bool:
    """Whether a table is written with quotes: every field that begins with a quote also ends with one.

    A quoted field may contain tabs and line breaks. Lines are therefore joined until it closes, but never across a line that
    could itself be a row.
    """
    file.seek(0)
    any_quoted, state, length = False, "none", 0
    for line in file:
        line, inside = line.rstrip("\r\n"), state == "open"
        if inside and shape.is_row(line):
            return False
        length = length + len(line) if inside else len(line)
        state = _quote_state(line, shape.delimiter, inside=inside)
        if state == "wrong" or length > MAX_FIELD:
            return False
        any_quoted |= state != "none"
    return any_quoted and state != "open"


def _quote_state(line: str, delimiter: str, *, inside: bool = False) -> str:
    """Classifies a line by its quotes.

    Returns:
        ``none``: no field begins with a quote; ``closed``: all that do end with one; ``open``: the last does not; or ``wrong``.
    """
    at, state = 0, "none"
    while at <= len(line):
        if inside or line.startswith('"', at):
            match = _CLOSE.match(line, at if inside else at + 1)
            if match is None:
                return "open"
            inside = False
            at = match.end()
            if at < len(line) and not line.startswith(delimiter, at):
                return "wrong"
            state = "closed"
            at += 1
        else:
            end = line.find(delimiter, at)
            if end < 0:
                return state
            at = end + 1
    return state


def _records(file: Any, where: str, shape: _Shape, quoted: bool, *, spaced: bool) -> Records:
    """Yields (number of its first line, fields) of each row, including the header; skips blank lines."""
    file.seek(0)
    physical: list[str] = []  # the lines of the current row

    def lines() -> Iterator[str]:
        for line in file:
            physical.append(line)
            yield line

    if quoted:
        reader = csv.reader(lines(), delimiter=shape.delimiter, strict=True, skipinitialspace=spaced)
    else:
        reader = csv.reader(lines(), delimiter=shape.delimiter, strict=True, skipinitialspace=spaced, quoting=csv.QUOTE_NONE)
    usual, begin = csv.field_size_limit(), 1
    while True:
        csv.field_size_limit(MAX_FIELD)  # global to the process, so set for this row only
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _broken(where, begin, str(error)) from error
        finally:
            csv.field_size_limit(usual)
        if fields is None:
            return
        if len(physical) > 1:
            path = fields[shape.path] if len(fields) > shape.path else ""
            # A quote that is not meant to open a field would swallow rows until the next quote.
            if any(shape.is_row(line, path) for line in physical[1:]):
                raise _broken(where, begin, "unexpected end")
        blank = not any(line.strip() for line in physical)
        physical.clear()
        if not blank:
            yield begin, fields
        begin = reader.line_num + 1


def _fitting(records: Records, columns: int, where: str) -> Records:
    """Yields the rows after the header; raises at the end if some had another number of fields."""
    misfits: list[tuple[int, int]] = []
    count = total = 0
    for line, fields in records:
        total += 1
        if len(fields) == columns:
            yield line, fields
            continue
        count += 1
        if len(misfits) < _NAMED:
            misfits.append((line, len(fields)))
    if count:
        shown = ", ".join(f"line {line} has {n}" for line, n in misfits) + (" …" if count > len(misfits) else "")
        raise DataError(
            f"{count} of {total} rows do not have the {columns} fields of the header: {shown}",
            where=f"{where}:{misfits[0][0]}",
            hint='Put fields that hold the delimiter between quotes ("a dog, running"), or write JSON lines',
        )


def _broken(where: str, begin: int, reason: str) -> DataError:
    if "field larger" in reason:
        reason = f"a field of more than {MAX_FIELD} characters, probably behind a quote that never closes"
    elif "unexpected end" in reason:
        reason = "a quote that never closes, or closes in another row"
    else:
        reason = f"a quote that does not close at the end of its field ({printable(reason, limit=80)})"
    return DataError(
        f"the row that starts here has {reason}",
        where=f"{where}:{begin}",
        hint='Write quotes twice inside a quoted field (""like this""), or write JSON lines',
    )
