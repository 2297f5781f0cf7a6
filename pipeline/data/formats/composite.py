"""Shows images of any channels to people: chosen channels or principal components as colours, stretched by percentiles."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Shown = tuple[int, ...] | Literal["pca"]
LOW, HIGH = 1.0, 99.0  # percentiles of an image that are shown as black and white
_FITTED = 10_000  # pixels that principal components are computed from


def composite(image: NDArray[Any], shown: Shown) -> NDArray[np.uint8]:
    """An image as colours. Each of the three is stretched from the 1st to the 99th percentile of its own values in this image.

    Args:
        image: ``[height, width, channels]``, in any unit.
        shown: positions of the channels that become red, green and blue, a single one for gray, or ``pca`` for the first three
            principal components of the image's pixels (each channel divided by its own standard deviation).

    Returns:
        uint8 ``[height, width, 3]``.
    """
    values = np.asarray(image, dtype=np.float32)
    three = _principal(values) if shown == "pca" else values[:, :, list(shown)]
    low, high = np.percentile(three, (LOW, HIGH), axis=(0, 1))
    spread = np.where(high > low, high - low, 1)
    stretched = np.clip((three - low) / spread, 0, 1)
    colours: NDArray[np.uint8] = np.rint(255 * stretched).astype(np.uint8)
    if colours.shape[2] < 3:
        colours = np.concatenate([colours[:, :, :1]] * 3, axis=2)
    return colours


def default_shown(count: int) -> tuple[int, ...]:
    """The first three channels, or the first as gray where there are fewer."""
    return (0, 1, 2) if count >= 3 else (0,)


def _principal(values: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = values.reshape(-1, values.shape[2]).astype(np.float64)
    flat = (flat - flat.mean(0)) / np.maximum(flat.std(0), 1e-12)
    some = flat[:: max(len(flat) // _FITTED, 1)]
    _, vectors = np.linalg.eigh(some.T @ some)
    axes = vectors[:, ::-1][:, :3]
    axes = axes * np.where(axes.sum(0) < 0, -1, 1)  # the sign of an eigenvector is arbitrary
    return (flat @ axes).reshape(*values.shape[:2], -1).astype(np.float32)
