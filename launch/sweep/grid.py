"""Members of a sweep: the combinations of ``KEY=[A,B]`` and ``KEY=range(3)``, and the lines of a list."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.untrusted import read_bytes

MOST = 1000  # members
_LARGEST_LIST = 4 << 20
_RANGE = re.compile(r"range\(\s*(-?\d{1,9})\s*(?:,\s*(-?\d{1,9})\s*(?:,\s*(-?\d{1,9})\s*)?)?\)")
_PAIRS = {"[": "]", "{": "}", "(": ")"}
OWN = ("run.directory", "run.name", "train.pause_at")


def members(settings: Sequence[str], lines: Sequence[Sequence[str]] = ((),)) -> list[tuple[str, ...]]:
    """The settings of each member, in order: each line of a list, and within it the grid, its last key changing fastest.

    Args:
        settings: texts ``KEY=VALUE``; ``KEY=[A,B]`` and ``KEY=range(…)`` give a key several values. A value that is itself a list
            stands in two brackets: ``KEY=[[10,20]]``.
        lines: texts ``KEY=VALUE`` of each line of a list.

    Raises:
        ConfigError: a text is not of this form, a key occurs twice, or there are no members or too many.
    """
    combinations: list[tuple[str, ...]] = []
    for line in lines:
        keys = [_key(text) for text in (*line, *settings)]
        if twice := [key for number, key in enumerate(keys) if key in keys[:number]]:
            raise ConfigError("is set twice", where=twice[0], hint="Name each setting once")
        axes = [[f"{_key(text)}={value}" for value in values(text.partition("=")[2])] for text in (*line, *settings)]
        number = 1
        for axis in axes:
            number *= len(axis)
        if not 0 < len(combinations) + number <= MOST:
            raise ConfigError(
                f"{len(combinations) + number} members must be between 1 and {MOST}", where="sweep", hint="Give fewer values"
            )
        combinations += list(itertools.product(*axes))
    return combinations


def values(text: str) -> list[str]:
    """The values that a key takes, as written: of ``[A,B]``, of ``range(…)``, or the only one.

    Raises:
        ConfigError: brackets or quotes do not match, or a range is empty.
    """
    text = text.strip()
    if match := _RANGE.fullmatch(text):
        bounds = [int(number) for number in match.groups() if number is not None]
        if len(bounds) == 3 and not bounds[2]:
            raise ConfigError("must not have a step of 0", where=text, hint="Write range(3) or range(0, 10, 2)")
        if len(span := range(*bounds)) > MOST:
            raise ConfigError(f"{len(span)} values are too many", where=text, hint=f"Give at most {MOST}")
        return [str(number) for number in span]
    return split(text[1:-1], text) if text[:1] == "[" and text[-1:] == "]" else [text]


def split(inner: str, shown: str) -> list[str]:
    """Splits text at the commas that are in no brackets and no quotes.

    Raises:
        ConfigError: brackets or quotes do not match, or a part is empty.
    """
    parts, closing, quote = [""], [], ""
    for sign in inner:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in _PAIRS:
            closing.append(_PAIRS[sign])
        elif closing and sign == closing[-1]:
            closing.pop()
        elif sign == "," and not closing:
            parts.append("")
            continue
        parts[-1] += sign
    if quote or closing or not all(part.strip() for part in parts):
        raise ConfigError("is not a list of values", where=shown, hint="Write KEY=[1e-3,2e-3]")
    return [part.strip() for part in parts]


def read_list(file: Path) -> list[tuple[str, ...]]:
    """Members of a file: one set of ``KEY=VALUE`` per line, quoted as in a shell; empty lines and ``#`` comments are skipped.

    Raises:
        ConfigError: it cannot be read, holds none, or quotes do not match.
    """
    try:
        lines = read_bytes(file, limit=_LARGEST_LIST, error=ConfigError).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read ({error})", where=str(file), hint="Give a text file with settings per line") from error
    sets = []
    for number, line in enumerate(lines, 1):
        try:
            texts = shlex.split(line, comments=True)
        except ValueError as error:
            raise ConfigError(f"{error}".lower(), where=f"{file}:{number}", hint="Write KEY=VALUE KEY=VALUE") from None
        if texts:
            sets.append(tuple(texts))
    if not sets:
        raise ConfigError("names no member", where=str(file), hint="Write KEY=VALUE KEY=VALUE on each line")
    return sets


def _key(text: str) -> str:
    key, equals, _ = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError("must be KEY=VALUE", where=repr(text[:80]), hint="Write schedule.lr.peak=[1e-3,2e-3]")
    if key in OWN:
        raise ConfigError("is set by the sweep", where=key, hint="Name the sweep with --name")
    return key
