"""Turns the hue of images within DALI graphs: by channel arithmetic, or in one kernel for a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, python_function_plugin, types
from torch.utils.dlpack import from_dlpack, to_dlpack


def as_bytes(image: Any) -> Any:
    """Rounds values to uint8."""
    return fn.cast(image, dtype=types.UINT8)


def _hue_channel(sixths: Any, value: Any, chroma: Any, offset: float) -> Any:
    k = sixths + np.float32(offset + 12)
    k = k - math.floor(k * np.float32(1 / 6)) * np.float32(6)
    # clamp() is equivalent but many times slower on a CPU.
    return value - chroma * math.min(math.max(math.min(k, np.float32(4) - k), np.float32(0)), np.float32(1))


def turn_hue(image: Any, turns: Any) -> Any:
    """Rotates the hue by a fraction of the colour circle, exactly, by channel arithmetic; ``[h, w, 3]`` uint8 in and out.

    For a GPU on which :func:`pipeline.data.augment.dali.fused_hue` does not hold: on a CPU the same arithmetic is faster in
    :mod:`pipeline.data.augment.hue`.
    """
    x = fn.cast(image, dtype=types.FLOAT) * np.float32(1 / 255)
    channels = turned_channels(x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3], turns)
    return as_bytes(fn.cat(*channels, axis=2) * np.float32(255))


def turned_channels(r: Any, g: Any, b: Any, turns: Any) -> list[Any]:
    """The three channels, from 0 to 1, with their hue rotated."""
    value = math.max(r, math.max(g, b))
    chroma = value - math.min(r, math.min(g, b))
    divisor = math.max(chroma, np.float32(1e-8))
    is_r = fn.cast(value == r, dtype=types.FLOAT)
    is_g = fn.cast(value == g, dtype=types.FLOAT) * (np.float32(1) - is_r)
    is_b = np.float32(1) - is_r - is_g
    sixths = (
        is_r * ((g - b) / divisor)
        + is_g * ((b - r) / divisor + np.float32(2))
        + is_b * ((r - g) / divisor + np.float32(4))
        + turns * np.float32(6)
    )

    return [_hue_channel(sixths, value, chroma, offset) for offset in (5.0, 3.0, 1.0)]


Turn = Callable[[Sequence[Any], Sequence[Any]], list[Any]]


def turned_at_once(
    turn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], images: Sequence[Any], turns: Sequence[Any]
) -> list[Any]:
    """DLPack capsules of images of one size, turned by one call on the stream of the DALI operator that calls this."""
    x, angles = ([from_dlpack(one) for one in batch] for batch in (images, turns))
    device = x[0].device
    stream = torch.cuda.ExternalStream(python_function_plugin.current_dali_stream(), device) if device.type == "cuda" else None
    with torch.cuda.stream(stream):
        return [to_dlpack(one) for one in turn(torch.stack(x), torch.stack(angles)).unbind()]
