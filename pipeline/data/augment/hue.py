"""Rotates the hue of images exactly, in HSV space, on a CPU: one pass over blocks that fit its cache.

The same operations in the same order as the DALI graph of a GPU, so that both give the same pixels; as DALI operators they take
several times as long on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16384  # pixels whose intermediate results fit into a core's own cache
_F = np.float32
_ZEROS, _ONES = np.zeros(_BLOCK, _F), np.ones(_BLOCK, _F)


def turn_hues(images: Sequence[Any], turns: Sequence[Any], pool: ThreadPoolExecutor | None = None) -> list[NDArray[np.uint8]]:
    """Rotate each image's hue.

    Args:
        images: uint8 ``[height, width, 3]`` each.
        turns: float32 scalar each, fractions of the colour circle.
        pool: threads, one image at a time; numpy's loops leave the interpreter to others.
    """
    return list((map if pool is None else pool.map)(_turned, images, turns))


def _turned(image: Any, turns: Any) -> NDArray[np.uint8]:
    pixels = np.ascontiguousarray(image).reshape(-1, 3)
    sixths = _F(turns) * _F(6)
    out = np.empty_like(pixels)
    for begin in range(0, len(pixels), _BLOCK):
        _turn(pixels[begin : begin + _BLOCK], sixths, out[begin : begin + _BLOCK])
    return out.reshape(image.shape)


def _turn(pixels: NDArray[np.uint8], turned: np.float32, out: NDArray[np.uint8]) -> None:
    """Pixels ``[n, 3]`` with their hue turned by ``turned`` sixths of the circle, into ``out``."""
    planes = np.empty((3, len(pixels)), _F)
    np.multiply(pixels.T, _F(1 / 255), out=planes, dtype=_F)
    r, g, b = planes
    value = np.maximum(g, b)
    np.maximum(r, value, out=value)
    chroma = np.minimum(g, b)
    np.minimum(r, chroma, out=chroma)
    np.subtract(value, chroma, out=chroma)
    divisor = np.maximum(chroma, _F(1e-8))
    # Hue in sixths of the circle, by the largest channel: red before green before blue. Products with 0 and 1 are several times
    # as fast as masked copies, and arrays of constants as constants.
    zeros, ones = _ZEROS[: len(pixels)], _ONES[: len(pixels)]
    is_red = np.equal(value, r).view(np.uint8).astype(_F)
    is_green = np.equal(value, g).view(np.uint8) * (ones - is_red)
    sixths = is_red * _offset(g, b, divisor, 0)
    sixths += is_green * _offset(b, r, divisor, 2)
    is_red += is_green
    sixths += np.subtract(ones, is_red, out=is_red) * _offset(r, g, divisor, 4)
    sixths += turned
    part = np.empty_like(sixths)
    for channel, offset in enumerate((5, 3, 1)):
        position = sixths + _F(offset + 12)
        np.multiply(position, _F(1 / 6), out=part)
        np.floor(part, out=part)
        part *= _F(6)
        position -= part
        np.subtract(_F(4), position, out=part)
        np.minimum(position, part, out=part)
        np.maximum(part, zeros, out=part)
        np.minimum(part, ones, out=part)
        part *= chroma
        np.subtract(value, part, out=part)
        part *= _F(255)
        # To the nearest level, halves up as in DALI's conversion; adding 0.5 would also lift the number just below a half.
        np.floor(part, out=position)
        part -= position
        position += part >= _F(0.5)
        out[:, channel] = position


def _offset(a: NDArray[Any], b: NDArray[Any], divisor: NDArray[Any], sixths: int) -> NDArray[Any]:
    difference = a - b
    difference /= divisor
    if sixths:
        difference += _F(sixths)
    return difference
