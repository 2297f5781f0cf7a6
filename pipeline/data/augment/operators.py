"""The table of augmentation operators: what each draws for a sample, and what its DALI graph is built for.

A new operator takes a field of :class:`~pipeline.data.augment.settings.AugmentSettings`, the same field of :class:`Augment` and a
row of :data:`OPERATORS` here, and a function in :mod:`pipeline.data.augment.dali`. Existing draws do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.channel_settings import MAX_CHANNELS


@dataclass(frozen=True)
class Augment:
    """Augmentation of one view after it was cut and resized: flip, the operators in the order of the table, normalization.

    A field with the name of a field of :class:`~pipeline.data.augment.settings.AugmentSettings` takes its value. Ranges follow
    torchvision's ColorJitter: a factor is uniform in ``[1 - v, 1 + v]``, the hue shift uniform in ``[-v, v]``.

    Attributes:
        flip_probability: probability of a horizontal flip.
        jitter_probability: probability of colour jitter, in the fixed order brightness, contrast, saturation, hue.
        brightness, contrast, saturation: half the range of the factor.
        hue_shift: half the range of the hue shift, turns of the colour circle.
        gray_probability: probability of grayscale (three equal channels, ITU-R 601 luma).
        blur_probability: probability of a Gaussian blur, sigma uniform in ``blur_sigma`` pixels.
        blur_kernel: width of the blur kernel in pixels, odd; ``auto`` grows it with sigma, which approximates Pillow's blur by
            radius (DINO, SLIP, DetailCLIP).
        gain: half the range of a factor of each channel, of its normalized values.
        offset: maximum of a shift of each channel up or down, in standard deviations.
        noise: maximum standard deviation of Gaussian noise, in standard deviations of each channel.
        channel_dropout: probability that a channel is replaced by its mean.
        groups: number of the group of each channel, for images of declared channels: each group has its own brightness and
            contrast factors. Empty for RGB, which has one of each.
        solarize_probability: probability that values of ``solarize_threshold`` (0..255) and above are inverted.
    """

    flip_probability: float = 0.5
    jitter_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue_shift: float = 0.0
    gray_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int | Literal["auto"] = 9
    solarize_probability: float = 0.0
    solarize_threshold: int = 128
    gain: float = 0.0
    offset: float = 0.0
    noise: float = 0.0
    channel_dropout: float = 0.0
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    Attributes:
        name: key of the operator's function in :mod:`pipeline.data.augment.dali`.
        draws: which of a sample's uniform numbers it reads. They are part of every run's data: a row keeps its own for ever, and
            a new row takes the next free ones, wherever it stands in the table.
        plan: makes the operator's plan arrays, ``[n]`` each (or ``[n, channels]``), from its draws ``[k, n]``.
        condition: which of these arrays is nonzero where the operator is applied.
        used: whether a view applies it to any sample; if not, ``condition`` is 0 for all.
        constants: fields of :class:`Augment` for which the graph is built; they must be the same for all samples of a view.
    """

    name: str
    draws: range
    plan: Callable[[NDArray[np.float64], Augment], dict[str, NDArray[Any]]]
    condition: str
    used: Callable[[Augment], bool]
    constants: tuple[str, ...] = ()


def _factor(draw: NDArray[np.float64], strength: float) -> NDArray[np.float32]:
    low = max(0.0, 1.0 - strength)
    return (low + (1.0 + strength - low) * draw).astype(np.float32)


def _jitter(draws: NDArray[np.float64], augment: Augment) -> dict[str, NDArray[Any]]:
    return {
        "jitter": draws[0] < augment.jitter_probability,
        "brightness": _factor(draws[1], augment.brightness),
        "contrast": _factor(draws[2], augment.contrast),
        "saturation": _factor(draws[3], augment.saturation),
        "hue": ((2 * draws[4] - 1) * augment.hue_shift).astype(np.float32),
    }


def _blur(draws: NDArray[np.float64], augment: Augment) -> dict[str, NDArray[Any]]:
    low, high = augment.blur_sigma
    return {"sigma": np.where(draws[0] < augment.blur_probability, low + (high - low) * draws[1], 0.0).astype(np.float32)}


def _group_jitter(draws: NDArray[np.float64], augment: Augment) -> dict[str, NDArray[Any]]:
    """One brightness and one contrast factor for each group of channels, ``[n, channels]``."""
    of = np.array(augment.groups, dtype=np.int64)
    by_sample = np.ascontiguousarray(draws.T)
    return {
        "group_brightness": _factor(by_sample[:, 2 * of], augment.brightness),
        "group_contrast": _factor(by_sample[:, 2 * of + 1], augment.contrast),
    }


def _per_channel(draws: NDArray[np.float64], augment: Augment) -> NDArray[np.float64]:
    return np.ascontiguousarray(draws[: len(augment.groups)].T)


def _gain_offset(draws: NDArray[np.float64], augment: Augment) -> dict[str, NDArray[Any]]:
    low, high = draws[:MAX_CHANNELS], draws[MAX_CHANNELS:]
    return {
        "gain": _factor(_per_channel(low, augment), augment.gain),
        "offset": ((2 * _per_channel(high, augment) - 1) * augment.offset).astype(np.float32),
    }


def _noise(draws: NDArray[np.float64], augment: Augment) -> dict[str, NDArray[Any]]:
    return {
        "noise_sigma": (draws[0] * augment.noise).astype(np.float32),
        "noise_seed": (draws[1] * 2.0**32).astype(np.uint32),
    }


def _dropout(draws: NDArray[np.float64], augment: Augment) -> dict[str, NDArray[Any]]:
    kept = _per_channel(draws, augment) >= augment.channel_dropout
    # An image without any channel says nothing: then the one with the largest draw stays.
    last = np.arange(kept.shape[1])[None] == np.argmax(_per_channel(draws, augment), axis=1)[:, None]
    return {"channel_kept": (kept | last).astype(np.float32)}


OPERATORS: tuple[Operator, ...] = (
    Operator("jitter", range(1, 6), _jitter, condition="jitter", used=lambda a: a.jitter_probability > 0),
    Operator(
        "gray",
        range(6, 7),
        lambda draws, a: {"gray": draws[0] < a.gray_probability},
        condition="gray",
        used=lambda a: a.gray_probability > 0,
    ),
    Operator(
        "blur",
        range(7, 9),
        _blur,
        condition="sigma",
        used=lambda a: a.blur_probability > 0,
        constants=("blur_kernel",),
    ),
    Operator(
        "solarize",
        range(9, 10),
        lambda draws, a: {"solarize": draws[0] < a.solarize_probability},
        condition="solarize",
        used=lambda a: a.solarize_probability > 0,
        constants=("solarize_threshold",),
    ),
)
"""All operators in the order in which they are applied. Draw 0 is the flip's."""

CHANNEL_OPERATORS: tuple[Operator, ...] = (
    Operator(
        "group_jitter",
        range(10, 10 + 2 * MAX_CHANNELS),
        _group_jitter,
        condition="jitter",
        used=lambda a: bool(a.groups) and a.jitter_probability > 0,
    ),
    Operator(
        "gain",
        range(42, 42 + 2 * MAX_CHANNELS),
        _gain_offset,
        condition="gain",
        used=lambda a: bool(a.groups) and (a.gain > 0 or a.offset > 0),
    ),
    Operator(
        "noise",
        range(74, 76),
        _noise,
        condition="noise_sigma",
        used=lambda a: bool(a.groups) and a.noise > 0,
    ),
    Operator(
        "dropout",
        range(76, 76 + MAX_CHANNELS),
        _dropout,
        condition="channel_kept",
        used=lambda a: bool(a.groups) and a.channel_dropout > 0,
    ),
)
"""Operators for images of declared channels alone, planned only where they are used. The first takes the place of the brightness
and contrast of ``jitter``; the others follow after all of :data:`OPERATORS`, and act in standard deviations of a channel.
"""
