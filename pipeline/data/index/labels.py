"""Parses class labels of folder names, tables, ``.cls`` members and JSON, by one rule.

Non-negative integers, also as text (``"3"``, ``"3.0"``, ``3.0``), are class indices. Negative ones, NaN and empty values mean no
label. Other text is a class name, normalized to NFC (macOS decomposes accents); names are numbered in alphabetical order, and
never mixed with indices.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

from pipeline.data.index.captions import decode_text
from pipeline.errors import DataError
from pipeline.untrusted import printable

LabelMode = Literal["auto", "names"]
LABEL_MODES: tuple[LabelMode, ...] = ("auto", "names")
MAX_LABEL = 10**9  # upper bound of class indices, exclusive
EMPTY, NEGATIVE, BAD = "empty_label", "negative_label", "bad_label"  # notes
_NUMBER = re.compile(r"[+-]?[0-9]{1,400}(\.[0-9]{0,400})?([eE][+-]?[0-9]{1,3})?")
_NOTHING = ("", "nan", "<na>")  # as pandas writes missing values
_MAYBE_NOTHING = ("none", "null", "n/a", "#n/a", "nil")


def read_label(value: Any) -> tuple[int | str | None, str]:
    """Parses the class label of a sample.

    Args:
        value: a folder name, a value of a table or JSON, or the bytes of a ``.cls`` member.

    Returns:
        The class index, or the class name, or None; and if it is None the reason: ``empty_label``, ``negative_label``, or
        ``bad_label`` for what is neither a name nor an integer below 10^9.
    """
    if isinstance(value, bytes):
        value = decode_text(value)[0]
    if isinstance(value, str):
        text = value.strip()
        if text.isascii() and text.isdigit() and len(text) < 10:  # fast path for nearly all labels
            return int(text), ""
        if text.lower() in _NOTHING:
            return None, EMPTY
        if not _NUMBER.fullmatch(text):
            return _name(text), ""
        value = Decimal(text)
    if value is None or (isinstance(value, (float, Decimal)) and math.isnan(value)):
        return None, EMPTY
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)) or value in (math.inf, -math.inf):
        return None, BAD
    if value < 0:
        return None, NEGATIVE
    if value >= MAX_LABEL or value != int(value):
        return None, BAD
    return int(value), ""


def read_name(value: Any) -> tuple[str | None, str]:
    """Parses a value as a class name, even if it looks like a number.

    None and a note, as in :func:`read_label`, if it is empty or not a plain value.
    """
    number, note = read_label(value)
    if note == EMPTY:
        return None, EMPTY
    if isinstance(value, str):
        return _name(value), ""
    if isinstance(number, int):
        return str(number), ""
    if isinstance(value, (bool, int, float, Decimal)):
        return str(value), ""
    return None, BAD


def maybe_none(classes: Sequence[str]) -> list[str]:
    """Returns the class names that programs write for a missing value, but that may be intended."""
    return [name for name in classes if name.lower() in _MAYBE_NOTHING]


def _name(text: str) -> str:
    return printable(unicodedata.normalize("NFC", text.strip()))


def number_labels(
    labels: Sequence[tuple[str, Any]],
    *,
    where: str,
    mode: LabelMode = "auto",
    classes: Sequence[str] = (),
    mixed_hint: str = "",
) -> tuple[list[int | None], tuple[str, ...], list[tuple[str, str]]]:
    """Converts labels to class indices.

    Args:
        labels: for each sample the location of its label (a row, a folder) and the label.
        where: the source, for messages.
        mode: ``names`` treats numbers as names too and assigns new numbers.
        classes: names whose positions are the class indices; other names are rejected. Empty: the names that occur, sorted.
        mixed_hint: the hint for names mixed with numbers, if the source has its own.

    Returns:
        An index or None for each sample; the class names, empty if the labels are numbers; (where, note) of each sample without
        a usable label and of each name with characters replaced.

    Raises:
        DataError: names are mixed with numbers, a label is neither, or a name is not among ``classes``.
    """
    if classes:
        mode = "names"
    read = [(read_name if mode == "names" else read_label)(label) for _, label in labels]
    origins = [origin for origin, _ in labels]
    notes = [(origin, note) for origin, (_, note) in zip(origins, read, strict=True) if note]
    bad = [n for n, (_, note) in enumerate(read) if note == BAD]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(labels)} labels are neither a name nor a whole number below 10^9: {_examples(labels, bad)}",
            where=where,
            hint="Correct them or leave the label empty",
        )
    names = [n for n, (label, _) in enumerate(read) if isinstance(label, str)]
    numbers = [n for n, (label, _) in enumerate(read) if isinstance(label, int)]
    if names and numbers:
        raise DataError(
            f"labels mix {len(names)} names ({_examples(labels, names)}) with {len(numbers)} numbers "
            f"({_examples(labels, numbers)})",
            where=where,
            hint=mixed_hint
            or "Give every sample a number or every sample a name, or add --labels names to read the numbers as names",
        )
    if not names:
        return [label if isinstance(label, int) else None for label, _ in read], (), notes
    notes += [
        (origins[n], "label_replaced")
        for n in names
        if isinstance(labels[n][1], str) and read[n][0] != unicodedata.normalize("NFC", labels[n][1].strip())
    ]
    known = tuple(_name(name) for name in classes) or tuple(sorted({str(read[n][0]) for n in names}))
    position = {name: number for number, name in enumerate(known)}
    unknown = [n for n in names if read[n][0] not in position]
    if unknown:
        raise DataError(
            f"{len(unknown)} labels are not among the {len(known)} classes of --classes: {_examples(labels, unknown)}",
            where=where,
            hint="Add them at the end of the file of --classes",
        )
    return [None if label is None else position[str(label)] for label, _ in read], known, notes


def _examples(labels: Sequence[tuple[str, Any]], chosen: Sequence[int], most: int = 3) -> str:
    shown: dict[str, str] = {}
    for n in chosen:
        origin, label = labels[n]
        shown.setdefault(printable(repr(label) if not isinstance(label, str) else f"{label!r}", limit=40), origin)
        if len(shown) == most:
            break
    return ", ".join(f"{label} in {printable(origin)}" for label, origin in shown.items())
