"""Draws the augmentation plan: all random parameters of every crop, computed on the host before decoding.

The plan of a sample depends only on its id, its epoch, the run's seed and the view specification. The crops of a sample are
therefore the same whatever the batch size, the rank, the number of threads or the point of resume; DALI only applies the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.operators import CHANNEL_OPERATORS, OPERATORS, Augment
from pipeline.data.augment.views import ViewSet, ViewSpec
from pipeline.data.order.random import uniforms

_ATTEMPTS = 10
_BOX_DRAWS = 2 * _ATTEMPTS + 2
_FLIP_DRAW = 0  # of the draws after the box's; the others are the operators'
_SET_STREAM = 2_000_003
PLAN_VERSION = 1


@dataclass(frozen=True)
class ViewPlan:
    """Augmentation parameters of one view of ``n`` samples.

    Attributes:
        start, end: float32 ``[n, 2]``, the box as (y, x), pixels of the decoded image.
        flip: int32 ``[n]``.
        values: the operators' arrays by name, ``[n]`` each. jitter: bool; brightness, contrast, saturation: float32 factors;
            hue: float32 turns; gray, solarize: bool; sigma: float32 pixels, 0 where the crop is not blurred. Of images with
            declared channels, as far as they are used: group_brightness, group_contrast, gain, offset and channel_kept (0 or 1),
            float32 ``[n, channels]``; noise_sigma: float32, noise_seed: uint32.
    """

    start: NDArray[np.float32]
    end: NDArray[np.float32]
    flip: NDArray[np.int32]
    values: dict[str, NDArray[Any]]

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by name, those of the operators included."""
        return {"start": self.start, "end": self.end, "flip": self.flip, **self.values}

    def take(self, rows: slice | list[int]) -> ViewPlan:
        """Returns the plan of some of the samples."""
        values = {name: array[rows] for name, array in self.values.items()}
        return ViewPlan(self.start[rows], self.end[rows], self.flip[rows], values)

    def replace_row(self, row: int, other: ViewPlan) -> None:
        """Replaces one row by the first row of another plan (for a substituted sample)."""
        for name, array in self.arrays.items():
            array[row] = other.arrays[name][0]


def random_boxes(
    draws: NDArray[np.float64], sizes: NDArray[np.int64], scale: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.int64]:
    """Draws random resized crops: ten attempts, then the centre, as torchvision's RandomResizedCrop.

    An image so elongated that none of ten crops fits is cropped in its middle, over its whole shorter side, to the allowed aspect
    ratio that is nearest to its own; ``scale`` is then not kept. No crop has a side of less than one pixel.

    Args:
        draws: ``[n, 22]`` uniforms: ten areas, ten log-ratios, two positions.
        sizes: ``[n, 2]`` heights and widths of the images, pixels.
        scale: minimum and maximum fraction of the area.
        ratio: minimum and maximum width/height.

    Returns:
        ``[n, 4]`` int64: top, left, height, width.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, :_ATTEMPTS])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * draws[:, _ATTEMPTS : 2 * _ATTEMPTS])
    w = np.rint(np.sqrt(area * aspect))
    h = np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = np.argmax(fits, axis=1)
    rows = np.arange(len(sizes))
    crop_h, crop_w = h[rows, first], w[rows, first]
    top = np.floor(draws[:, -2] * (height - crop_h + 1))
    left = np.floor(draws[:, -1] * (width - crop_w + 1))
    none = ~fits.any(axis=1)
    if none.any():
        ratio_of_image = width / height
        fall_w = np.where(ratio_of_image > ratio[1], np.maximum(np.rint(height * ratio[1]), 1), width)
        fall_h = np.where(ratio_of_image < ratio[0], np.maximum(np.rint(width / ratio[0]), 1), height)
        crop_h, crop_w = np.where(none, fall_h, crop_h), np.where(none, fall_w, crop_w)
        top = np.where(none, np.floor((height - crop_h) / 2), top)
        left = np.where(none, np.floor((width - crop_w) / 2), left)
    return np.stack([top, left, crop_h, crop_w], axis=1).astype(np.int64)


def _ratio(spec: ViewSpec) -> tuple[float, float]:
    """Minimum and maximum width/height of a view's crops: those of the settings are relative to the view's own."""
    height, width = spec.shape
    low, high = spec.crop_ratio
    return (low, high) if height == width else (low * width / height, high * width / height)


def centred_boxes(sizes: NDArray[np.int64], shape: tuple[int, int], share: float, position: float) -> NDArray[np.float32]:
    """Boxes of evaluation views: the largest with the view's aspect ratio, shrunk to a share of its sides.

    Args:
        sizes: ``[n, 2]`` heights and widths of the images, pixels.
        shape: height and width of the view.
        share: sides of the box as a fraction of the largest box's.
        position: along the side that the largest box does not fill, 0 to 1; along the other one, the box is in the middle.

    Returns:
        ``[n, 4]`` float32: top, left, height, width.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    wide = width * shape[0] > height * shape[1]  # wider than the view
    largest = np.stack(
        [np.where(wide, height, width * shape[0] / shape[1]), np.where(wide, height * shape[1] / shape[0], width)], axis=1
    )
    box = largest * share
    slack = sizes - box
    start = np.where(sizes > largest, slack * position, slack / 2)
    return np.concatenate([start, box], axis=1).astype(np.float32)


def plan_view(
    spec: ViewSpec,
    view: int,
    stream: int,
    *,
    ids: NDArray[np.uint64],
    epochs: NDArray[np.int64],
    sizes: NDArray[np.int64],
    seed: int,
) -> ViewPlan:
    """Draws the plan of one view of a set of samples.

    Args:
        spec: the kind of view.
        view: which of its ``count`` views.
        stream: a number unique to this view within the method.
        ids: ``[n]`` uint64 sample numbers.
        epochs: ``[n]`` epoch of each sample.
        sizes: ``[n, 2]`` height and width of the decoded images, pixels.
        seed: the run's seed.
    """
    augment: Augment = spec.augment[view % len(spec.augment)]
    operators = [*OPERATORS, *(operator for operator in CHANNEL_OPERATORS if operator.used(augment))]
    count = max(operator.draws.stop for operator in operators)
    draws = uniforms(ids, _BOX_DRAWS + count, seed, stream, epochs=epochs)
    if spec.crop_scale is None:
        box = centred_boxes(sizes, spec.shape, spec.centre, spec.position)
    else:
        box = random_boxes(draws[:, :_BOX_DRAWS], sizes, spec.crop_scale, _ratio(spec)).astype(np.float32)
    colour = draws[:, _BOX_DRAWS:].T
    values: dict[str, NDArray[Any]] = {}
    for operator in operators:
        values |= operator.plan(colour[operator.draws.start : operator.draws.stop], augment)
    return ViewPlan(
        start=box[:, :2].copy(),
        end=box[:, :2] + box[:, 2:],
        flip=(colour[_FLIP_DRAW] < augment.flip_probability).astype(np.int32),
        values=values,
    )


def make_plan(
    specs: tuple[ViewSpec, ...], *, ids: NDArray[np.uint64], epochs: NDArray[np.int64], sizes: NDArray[np.int64], seed: int
) -> list[ViewPlan]:
    """Draws the plans of all views of all specs, in the order of the specs, one :class:`ViewPlan` per view."""
    plans: list[ViewPlan] = []
    streams: dict[str, int] = {}
    free = 0
    for spec in specs:
        streams[spec.name] = free if spec.same_as is None else streams[spec.same_as]
        free += spec.count if spec.same_as is None else 0
        for view in range(spec.count):
            plans.append(plan_view(spec, view, streams[spec.name] + view, ids=ids, epochs=epochs, sizes=sizes, seed=seed))
    return plans


def set_of_step(sets: Sequence[ViewSet], step: int, *, seed: int) -> int:
    """Returns which set of views a step uses: a function of the step and the run's seed, and so the same on every rank."""
    shares = np.cumsum([one.weight for one in sets])
    draw = uniforms(np.array([step], dtype=np.uint64), 1, seed, _SET_STREAM)[0, 0]
    return min(int(np.searchsorted(shares, draw * shares[-1], side="right")), len(sets) - 1)
