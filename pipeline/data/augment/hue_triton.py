"""Rotates the hue of images exactly, in HSV space, in one Triton kernel.

The same operations in the same order as :mod:`pipeline.data.augment.hue`, so that the pixels are the same. As DALI operators on
a GPU they are 64 kernels, each of which reads and writes images in fp32; here each pixel is read and written once, in 6 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # pixels of a program


def turn_hues(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate each image's hue, on the current stream.

    Args:
        images: uint8 ``[n, height, width, 3]``, contiguous.
        turns: float32 ``[n]``, fractions of the colour circle.
    """
    out = torch.empty_like(images)
    pixels = images.shape[1] * images.shape[2]
    # Fused multiply-adds would round once where the other forms round twice.
    _turn[(len(images), triton.cdiv(pixels, BLOCK))](images, turns, out, pixels, BLOCK=BLOCK, enable_fp_fusion=False)
    return out


@triton.jit
def _turn(images: tl.tensor, turns: tl.tensor, out: tl.tensor, pixels: int, BLOCK: tl.constexpr) -> None:
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    first = (image * pixels + pixel) * 3
    r = tl.load(images + first, inside, 0).to(tl.float32) * (1 / 255)
    g = tl.load(images + first + 1, inside, 0).to(tl.float32) * (1 / 255)
    b = tl.load(images + first + 2, inside, 0).to(tl.float32) * (1 / 255)
    value = tl.maximum(r, tl.maximum(g, b))
    chroma = value - tl.minimum(r, tl.minimum(g, b))
    divisor = tl.maximum(chroma, 1e-8)
    # In sixths of the circle, by the largest channel: red before green before blue.
    red, green, blue = (
        tl.math.div_rn(g - b, divisor),
        tl.math.div_rn(b - r, divisor) + 2.0,
        tl.math.div_rn(r - g, divisor) + 4.0,
    )
    sixths = tl.where(r == value, red, tl.where(g == value, green, blue)) + tl.load(turns + image) * 6.0
    tl.store(out + first, _level(sixths, value, chroma, 5.0), inside)
    tl.store(out + first + 1, _level(sixths, value, chroma, 3.0), inside)
    tl.store(out + first + 2, _level(sixths, value, chroma, 1.0), inside)


@triton.jit
def _level(sixths: tl.tensor, value: tl.tensor, chroma: tl.tensor, offset: tl.constexpr) -> tl.tensor:
    """A channel as uint8, rounded to the nearest level, halves up."""
    k = sixths + (offset + 12.0)
    k = k - tl.floor(k * (1 / 6)) * 6.0
    part = (value - chroma * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0)) * 255.0
    level = tl.floor(part)
    return (level + tl.where(part - level >= 0.5, 1.0, 0.0)).to(tl.uint8)
