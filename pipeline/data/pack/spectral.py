"""Synthetic scenes of eight channels with 16 bits, whose class is visible in the fifth channel alone.

Seven channels show a grainy ground, each with its own brightness and grain, and nothing else. The fifth shows the objects of a
scene (:mod:`pipeline.data.pack.synthetic`) as a stain would: those of the image's class on a ground, each as bright as the class
says; other objects are not stained. Features of RGB, or of any seven channels without the fifth, are at chance.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.random import uniforms
from pipeline.data.pack.generated import write_generated
from pipeline.data.pack.synthetic import CLASS_NAMES, render

CHANNELS = 8
STAINED = 4
"""Position of the channel in which the class is visible."""
GROUNDS = (0.3, 0.4, 0.5, 0.35, 0.0, 0.6, 0.25, 0.7)
"""Brightness of the ground in each channel but the stained one, of 1."""
GRAINS = (0.08, 0.06, 0.1, 0.05, 0.01, 0.12, 0.07, 0.05)
"""Standard deviation of the grain of each channel, of 1."""
DIMMEST, STEP = 0.1, 0.08
"""Lowest brightness of objects and ground in the stained channel, and difference between two classes, of 1."""
VERSION = 1
"""Increase it when the images change: existing data sets are then generated again."""

_PIXELS = 0x5CE4  # identifies the random draw


def render_channels(seed: int, index: int, size: int = 64) -> tuple[NDArray[np.uint16], int]:
    """Renders one image.

    Args:
        seed: seed of the data set.
        index: index of the image.
        size: side in pixels.

    Returns:
        uint16 ``[size, size, 8]``, and its class, a position in :data:`pipeline.data.pack.synthetic.CLASS_NAMES`.
    """
    scene = render(seed, index, size)
    draws = uniforms(np.array([index], dtype=np.uint64), size * size * CHANNELS, seed, _PIXELS)[0]
    grain = (draws.reshape(size, size, CHANNELS) - 0.5) * math.sqrt(12)
    image = np.array(GROUNDS) + np.zeros_like(grain)
    stained = scene.segmentation == scene.label + 1
    image[:, :, STAINED] = np.where(stained, _level(scene.label), _level(3 * scene.label + 1))
    return np.rint(np.clip(image + grain * np.array(GRAINS), 0, 1) * 65535).astype(np.uint16), scene.label


def _level(number: int) -> float:
    return DIMMEST + STEP * (number % len(CLASS_NAMES))


def write(
    directory: str | Path,
    *,
    train: int,
    val: int,
    size: int = 64,
    seed: int = 0,
    samples_per_shard: int = 1000,
    channels: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes the data set as shards ``spectral-train-00000.tar``… and ``spectral-val-00000.tar``…, with TIFF files.

    Does nothing if the same data set exists already (according to ``spectral.json``).

    Args:
        directory: output directory.
        train, val: number of training and of validation images; they are disjoint.
        size: side in pixels.
        seed: seed of the data set.
        samples_per_shard: images per shard.
        channels: positions of the channels to write; by default all.
        progress: called with (images done, total images).

    Returns:
        Paths of all shards, training first.

    Raises:
        ConfigError: tifffile is not installed.
    """
    from pipeline.data.formats.read import check_libraries

    check_libraries()
    chosen = list(range(CHANNELS) if channels is None else channels)
    numbers = {"train": train, "val": val, "size": size, "seed": seed, "samples_per_shard": samples_per_shard}

    def sample(index: int) -> dict[str, Any]:
        image, label = render_channels(seed, index, size)
        about = {"label": label, "class_name": CLASS_NAMES[label]}
        return {"tif": tiff(image[:, :, chosen]), "cls": label, "json": about}

    return write_generated(
        directory,
        "spectral",
        sample,
        {"version": VERSION, **numbers, "channels": chosen},
        train=train,
        val=val,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )


def tiff(image: NDArray[Any]) -> bytes:
    """An image ``[height, width, channels]`` as TIFF with one page for each channel."""
    import tifffile

    buffer = io.BytesIO()
    pages = np.ascontiguousarray(np.moveaxis(image, 2, 0))
    tifffile.imwrite(buffer, pages, photometric="minisblack", software="", metadata=None)
    return buffer.getvalue()
