"""Sizes of views and images: one number is the side of a square in pixels, two are height and width."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.errors import ConfigError

Size = int | tuple[int, int]


def height_width(size: Size) -> tuple[int, int]:
    """Height and width in pixels."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def shortest_side(size: Size) -> int:
    """The shorter side in pixels."""
    return min(height_width(size))


def square_side(size: Size, *, where: str) -> int:
    """The side of a square in pixels.

    Raises:
        ConfigError: it is not square.
    """
    if not isinstance(size, int):
        raise ConfigError(f"{size_text(size)} pixels (height x width) must be square", where=where, hint="Choose a side")
    return size


def scaled(size: Size, factor: int) -> Size:
    """A size with its sides multiplied."""
    return size * factor if isinstance(size, int) else (size[0] * factor, size[1] * factor)


def is_divisible(size: Size, patch: int) -> bool:
    """Whether patches of this side fill images of the size."""
    return not any(side % patch for side in height_width(size))


def nearest_sizes(size: Size, patch: int) -> list[Size]:
    """The sizes below and above with sides that are multiples of a patch side."""
    low, high = ([(side // patch + up) * patch for side in height_width(size)] for up in (0, 1))
    rounded = [(low[n], high[n]) if height_width(size)[n] % patch else (low[n], low[n]) for n in range(2)]
    near = [(rounded[0][up], rounded[1][up]) for up in (0, 1) if min(rounded[0][up], rounded[1][up])]
    return [one[0] if isinstance(size, int) else one for one in near]


def size_text(size: Size | Sequence[int]) -> str:
    """A size for people: ``224``, or ``224 x 448`` (height, width)."""
    return str(size) if isinstance(size, int) else " x ".join(map(str, size))


def grid_of(size: Size | Sequence[int], patch: int, patches: int | None = None) -> tuple[int, int]:
    """Rows and columns of the patches of an image.

    A patch embedding of one convolution has ``side // patch`` of them: timm's refuses sides that do not divide, others leave the
    rest out. ResNets and convolutional stems pad, and have ``ceil(side / patch)``. Both grids have the same number of patches
    only where they are the same.

    Args:
        size: side, or height and width, in pixels.
        patch: side of a patch, or stride of a convolutional network, in pixels.
        patches: number of patches that the network returned; ``None`` for sides that divide, as the views of transformers do.

    Raises:
        ValueError: no such grid has this number of patches.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    floor = (sides[0] // patch, sides[1] // patch)
    ceil = (-(-sides[0] // patch), -(-sides[1] // patch))
    for rows, columns in (floor, ceil):
        if patches is None or rows * columns == patches:
            return rows, columns
    raise ValueError(f"images of {size_text(sides)} pixels have no grid of {patches} patches of {patch} pixels")


def parse_size(text: str | None, *, where: str = "--size") -> Size | None:
    """A size from a command line: ``224``, or ``224x448`` for height and width; ``None`` without one.

    Raises:
        ConfigError: it is neither, or a side is out of range.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text.strip())
    sides = [int(side) for side in match.groups() if side is not None] if match else []
    if not sides or min(sides) < 1 or max(sides) > 1 << 14:
        raise ConfigError(
            f"{text[:40]!r} is not a size", where=where, hint="Write a side such as 224, or HEIGHTxWIDTH such as 224x448"
        )
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])
