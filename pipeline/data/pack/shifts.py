"""Domain shifts of the synthetic scenes: the same classes and layouts with another palette or textures, or as by a microscope.

For measuring how a network adapts to images unlike those that it was pretrained on, and what it forgets of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.random import uniforms

Plane = NDArray[np.float32]
Weave = Callable[[str, Plane, Plane, float], Plane]
Shift = Literal["none", "palette", "texture", "microscope"]
SHIFTS: tuple[str, ...] = get_args(Shift)
VERSION = 2
"""Increase it when the images change: existing data sets are then generated again."""

_NOISE = 0x5CE3  # identifies the random draws
_TURN = np.array([[0.25, 0.85, -0.1], [-0.15, 0.2, 0.95], [0.9, -0.1, 0.2]], dtype=np.float32)  # of red, green and blue
_FINER = np.float32(2)  # periods of another weave, relative to the scenes' own
_BLUR = (0.1, 0.8, 0.1)
_GRAIN = 0.02  # maximum standard deviation of the microscope's noise, of 1
# How much of red, green and blue passes where each of two stains, violet and pink, is thickest; and how much of a stain
# darkness and redness of the original image bind.
_STAINS = np.array([[0.2, 0.1, 0.6], [1.0, 0.3, 0.4]], dtype=np.float32)
_BINDS = np.array([[-0.6, -1.2, -0.2], [2.0, -2.0, 0.5]], dtype=np.float32)
_OFFSETS = np.array([1.4, 0.2], dtype=np.float32)


def shifted(image: NDArray[np.uint8], shift: Shift, seed: int, index: int) -> NDArray[np.uint8]:
    """An image of another domain: uint8 ``[size, size, 3]``.

    ``palette`` mixes the colours and inverts them; ``microscope`` shows two stains instead of
    colours, with blur, vignetting and noise;
    ``texture`` and ``none`` change nothing here.
    """
    if shift == "palette":
        turned = (np.float32(255) - image.astype(np.float32)) @ _TURN.T
        return np.clip(turned, 0, 255).astype(np.uint8)
    if shift != "microscope":
        return image
    size = len(image)
    dense = image.astype(np.float32) / 255
    bound = dense @ _BINDS.T + _OFFSETS
    thick = [_blurred(np.clip(bound[:, :, i], 0, None)) for i in range(2)]
    axis: Plane = np.linspace(-1, 1, size).astype(np.float32)
    light = 1 - np.float32(0.35) * (axis[:, None] ** 2 + axis[None, :] ** 2) / 2
    u = uniforms(np.array([index], dtype=np.uint64), size * size + 1, seed, _NOISE)[0].astype(np.float32)
    grain = (u[1:].reshape(size, size) - np.float32(0.5)) * np.float32(_GRAIN * np.sqrt(12) * (0.5 + 0.5 * u[0]))
    passed = _STAINS[0] ** thick[0][:, :, None] * _STAINS[1] ** thick[1][:, :, None]
    stained = passed * light[:, :, None] + grain[:, :, None]
    return np.clip(stained * 255, 0, 255).astype(np.uint8)


def _blurred(plane: Plane) -> Plane:
    size, blurred = len(plane), np.zeros_like(plane)
    padded = np.pad(plane, 1, mode="edge")
    for i, down in enumerate(_BLUR):
        for j, right in enumerate(_BLUR):
            blurred += np.float32(down * right) * padded[i : i + size, j : j + size]
    return blurred


def other_weave(texture: str, x: Plane, y: Plane, u: float) -> Plane:
    """Another family of textures, one for each of the scenes' own: positive in one colour and negative in the other."""
    offset, x, y = np.float32(u), x * _FINER, y * _FINER
    if texture == "striped":  # broken stripes
        return np.minimum(_triangle(x + offset), _triangle(y * np.float32(0.5) + offset) + np.float32(0.25))
    if texture == "ringed":  # rays
        rays: Plane = (np.arctan2(y, x) * (6 / (2 * np.pi)) + u).astype(np.float32)
        return _triangle(rays) * np.sqrt(x * x + y * y)
    if texture == "wavy":  # zigzag
        return _triangle((y + 2 * np.abs(x - np.rint(x)) + u).astype(np.float32))
    if texture == "checkered":  # a grid of thin lines
        return np.maximum(_triangle(x + offset), _triangle(y + offset)) - np.float32(0.25)
    fx, fy = x + offset, y + offset  # diamonds instead of dots
    return np.float32(2) * (np.float32(0.32) - np.abs(fx - np.rint(fx)) - np.abs(fy - np.rint(fy)))


def _triangle(x: Plane) -> Plane:
    """A triangle wave of period one between -0.5 and 0.5."""
    return np.float32(2) * np.abs(x - np.rint(x)) - np.float32(0.5)
