"""Reading the project's own source files in tests of its rules."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any


@cache
def source(path: Path) -> str:
    """Text of a file, read once."""
    return path.read_text(encoding="utf-8")


@cache
def parsed(path: Path) -> ast.Module:
    """Syntax tree of a file, made once."""
    return ast.parse(source(path), filename=str(path))


def kept(generate: Callable[..., Iterator[Any]]) -> Callable[..., tuple[Any, ...]]:
    """Make each result of a generator once; many rules read it."""
    return cache(lambda *args, **kwargs: tuple(generate(*args, **kwargs)))
