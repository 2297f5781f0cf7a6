"""Expands Slurm's compressed node lists (``a[1-3,5],b07-[01-02]``) without Slurm. Standard library only."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def hosts(text: str) -> Iterator[str]:
    """The nodes of a list, in its order, as printed by ``scontrol show hostnames``.

    Args:
        text: names with numbers in brackets, such as ``rack[1-2]n[01-16]-ib,login``; widths are kept.

    Raises:
        ValueError: not a node list.
    """
    for item in _split(text):
        parts: list[list[str]] = []
        rest = item
        while rest:
            before, opened, rest = rest.partition("[")
            if "]" in before or (opened and "]" not in rest):
                raise ValueError(f"{text!r} is not a Slurm node list")
            parts.append([before])
            if opened:
                inner, _, rest = rest.partition("]")
                parts.append([number for part in inner.split(",") for number in _numbers(part, text)])
        yield from ("".join(chosen) for chosen in itertools.product(*parts))


def _split(text: str) -> Iterator[str]:
    """Split at the commas outside brackets."""
    depth, begin = 0, 0
    for at, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise ValueError(f"{text!r} is not a Slurm node list")
        if letter == "," and depth == 0:
            if text[begin:at].strip():
                yield text[begin:at].strip()
            begin = at + 1
    if text[begin:].strip():
        yield text[begin:].strip()


def _numbers(part: str, text: str) -> Iterator[str]:
    match = _RANGE.fullmatch(part.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a Slurm node list")
    first, last = match[1], match[2] or match[1]
    if int(last) < int(first):
        raise ValueError(f"{text!r} is not a Slurm node list")
    yield from (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
