"""Images as square tiles of a sheet: their aspect ratio is kept, and what is left of the square is white."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.sizes import Size, height_width


def fitted(size: Size, side: int) -> tuple[int, int]:
    """Height and width of an image of some size whose longer side has ``side`` pixels."""
    height, width = height_width(size)
    longest = max(height, width)
    return max(round(height * side / longest), 1), max(round(width * side / longest), 1)


def letterboxed(images: NDArray[Any], side: int) -> NDArray[np.uint8]:
    """Images in the middle of white squares.

    Args:
        images: uint8 ``[n, height, width, 3]``, no side longer than ``side``.
        side: pixels.

    Returns:
        uint8 ``[n, side, side, 3]``.
    """
    count, height, width, _ = images.shape
    squares = np.full((count, side, side, 3), 255, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    squares[:, top : top + height, left : left + width] = images
    return squares
