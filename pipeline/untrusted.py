"""Validates untrusted input: names, paths, addresses, text and JSON of files that another user may have written.

There is one function for each kind; all readers of foreign input call these instead of their own checks.
"""

from __future__ import annotations

import json
import math
import os
import stat
import unicodedata
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, FoveaError
from pipeline.masking import NO_PASSWORD, UNPRINTABLE, has_password, hide_secrets, printable, shown, shown_address

__all__ = [
    "NO_PASSWORD",
    "UNPRINTABLE",
    "has_password",
    "hide_secrets",
    "inside",
    "open_regular",
    "parse_json",
    "plain_name",
    "plain_value",
    "printable",
    "read_bytes",
    "read_json",
    "shown",
    "shown_address",
]

MAX_NAME = 255  # bytes, the limit of common file systems
MAX_JSON = 64 << 20  # bytes of a JSON document
_MAX_DEPTH = 64  # levels of a JSON document; code that walks one may recurse
_MAX_VALUE = 200  # characters of a value
_EXACT = 1 << 53  # integers below which a float of JSON is exact


def plain_name(name: object, *, where: str, error: type[FoveaError] = DataError) -> str:
    """Returns the name if it is a plain file name: no separators, no ``.`` or ``..``, printable, at most 255 bytes.

    Args:
        name: as read from a manifest, a table or a journal.
        where: the file that contains the name, for the message.
        error: class of the error.

    Raises:
        FoveaError: of class ``error``, if the name is anything else.
    """
    if (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not ("/" in name or "\\" in name or UNPRINTABLE.search(name))
        and len(name.encode("utf-8")) <= MAX_NAME
    ):
        return name
    shown = printable(name, limit=80) if isinstance(name, str) else type(name).__name__
    raise error(f"{shown!r} must be a plain file name", where=where, hint="Restore the file: it is damaged or not to be trusted")


def inside(path: str | os.PathLike[str], folder: Path, *, where: str, error: type[FoveaError] = DataError) -> Path:
    """Returns the resolved path if it is inside the folder after resolving links.

    Args:
        path: absolute, or relative to ``folder``.
        folder: the directory that must contain it.
        where: what names the path, for the message.
        error: class of the error.

    Raises:
        FoveaError: of class ``error``, if the path is elsewhere or cannot be resolved.
    """
    root = folder.resolve()
    try:
        resolved = (root / path).resolve()
    except (OSError, ValueError, RuntimeError):
        resolved = None
    if resolved is None or not resolved.is_relative_to(root):
        raise error(
            f"{printable(os.fspath(path), limit=200)!r} lies outside {printable(str(folder))}",
            where=where,
            hint="Move the file below that folder: no other files are read",
        )
    return resolved


def open_regular(path: Path, *, where: str = "", error: type[FoveaError] = DataError) -> int:
    """Opens a regular file for reading without blocking and returns its descriptor.

    Links are followed; other file types are rejected, since a FIFO, a device or a socket could block or never end.

    Raises:
        FoveaError: of class ``error``, if it is not a regular file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise error(
        f"{printable(str(path))} must be a regular file", where=where, hint="Give a file: devices, pipes and folders are not read"
    )


def read_bytes(path: Path, *, limit: int, where: str = "", error: type[FoveaError] = DataError) -> bytes:
    """Reads a regular file of at most ``limit`` bytes.

    Raises:
        FoveaError: of class ``error``, if it is larger or not a regular file.
        OSError: it cannot be read.
    """
    with os.fdopen(open_regular(path, where=where, error=error), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise error(f"{printable(str(path))} must not be larger than {limit} bytes", where=where, hint="Give a smaller file")
    return content


def read_json(path: Path, *, limit: int = MAX_JSON, error: type[FoveaError] = DataError) -> Any:
    """Reads a JSON document from a regular file; all parse failures raise one error class.

    Raises:
        FoveaError: of class ``error``, if it is not JSON, too large or nested too deeply.
        OSError: it cannot be read.
    """
    content = read_bytes(path, limit=limit, error=error)
    try:
        return parse_json(content)
    except ValueError as cause:
        reason = printable(str(cause), limit=120)
        raise error(f"{printable(str(path))} must be JSON ({reason})", hint="Restore the file: it is damaged") from None


def plain_value(value: object) -> str | None:
    """Returns a value of a table or of JSON as text: a string without surrounding space in NFC, a number, ``true`` or ``false``.

    ``3``, ``3.0`` and ``"3"`` are the same. ``None`` for what is no single value: null, NaN, infinity, empty or blank text, text
    of more than 200 characters or with control characters, lists and objects.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() and abs(value) < _EXACT else repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < _EXACT else None
    if not isinstance(value, str) or len(value) > _MAX_VALUE or UNPRINTABLE.search(value.strip()):
        return None
    return unicodedata.normalize("NFC", value.strip()) or None


def parse_json(content: bytes | str) -> Any:
    """Parses a JSON document of at most 64 levels, so that code that walks it may recurse.

    Raises:
        ValueError: it is not JSON, or nested too deeply. This includes invalid UTF-8 and numbers of more than 4300 digits.
    """
    try:
        document = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(_MAX_DEPTH):
        if not level:
            return document
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
    if level:
        raise ValueError("nested too deeply")
    return document
