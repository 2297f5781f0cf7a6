"""The DALI graph: decoded images and a plan in, normalised crops out. The only file that imports DALI.

The graph holds no random operator and no state: it is a pure function of its inputs, and the same graph runs on CPU and GPU.
Colour operations follow torchvision's ColorJitter. DALI's own contrast pivots on a constant and its hue turns in YIQ space, so
contrast is done by arithmetic around the image's mean gray and hue, unless ``hue="yiq"``, by arithmetic in HSV space.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types

from pipeline.data.plan import ViewPlan
from pipeline.data.views import IMAGENET_MEAN, IMAGENET_STD, Augment, ViewSpec

Hue = Literal["hsv", "yiq", "off"]


def _byte(image: Any) -> Any:
    return fn.cast(image, dtype=types.UINT8)


def _hue_channel(sixths: Any, value: Any, chroma: Any, offset: float) -> Any:
    k = sixths + np.float32(offset + 12)
    k = k - math.floor(k * np.float32(1 / 6)) * np.float32(6)
    return value - chroma * math.clamp(math.min(k, np.float32(4) - k), np.float32(0), np.float32(1))


def _turn_hue(image: Any, turns: Any) -> Any:
    """Turn the hue by a share of the colour circle, exactly, by arithmetic on channels; ``[h, w, 3]`` uint8 in and out."""
    x = fn.cast(image, dtype=types.FLOAT) * np.float32(1 / 255)
    r, g, b = x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3]
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

    channels = [_hue_channel(sixths, value, chroma, offset) for offset in (5.0, 3.0, 1.0)]
    return _byte(fn.cat(*channels, axis=2) * np.float32(255))


def _input(index: int, field: str) -> str:
    return f"v{index}_{field}"


def _scalar(index: int, field: str, dtype: Any) -> Any:
    return fn.external_source(name=_input(index, field), ndim=0, dtype=dtype, batch=True)


def _jitter(x: Any, index: int, hue: str) -> Any:
    brightness, contrast = _scalar(index, "brightness", types.FLOAT), _scalar(index, "contrast", types.FLOAT)
    saturation = _scalar(index, "saturation", types.FLOAT)
    turns: Any = _scalar(index, "hue", types.FLOAT) if hue != "off" else None
    jittered = _scalar(index, "jitter", types.BOOL)
    if jittered:
        x = _byte(x * brightness)
        mean = fn.reductions.mean(fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY))
        x = _byte(x * contrast + mean * (np.float32(1) - contrast))
        if hue == "yiq":
            x = fn.color_twist(x, saturation=saturation, hue=turns * np.float32(360))
        else:
            x = fn.color_twist(x, saturation=saturation)
        if hue == "hsv":
            x = _turn_hue(x, turns)
    return x


def _gray(x: Any, index: int) -> Any:
    grayed = _scalar(index, "gray", types.BOOL)
    if grayed:
        gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
        x = fn.cat(gray, gray, gray, axis=2)
    return x


def _blur(x: Any, index: int, kernel: int) -> Any:
    sigma = _scalar(index, "sigma", types.FLOAT)
    if sigma > 0:
        x = fn.gaussian_blur(x, window_size=kernel, sigma=sigma)
    return x


def _solarize(x: Any, index: int, threshold: int) -> Any:
    solarized = _scalar(index, "solarize", types.BOOL)
    if solarized:
        values = [v if v < threshold else 255 - v for v in range(256)]
        x = fn.lookup_table(x, keys=list(range(256)), values=values, dtype=types.UINT8)
    return x


def _view(images: Any, spec: ViewSpec, augment: Augment, index: int, hue: str) -> Any:
    x = fn.resize(
        images,
        roi_start=fn.external_source(name=_input(index, "start"), ndim=1, dtype=types.FLOAT, batch=True),
        roi_end=fn.external_source(name=_input(index, "end"), ndim=1, dtype=types.FLOAT, batch=True),
        size=[spec.size, spec.size],
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
    if augment.jitter_p > 0:
        x = _jitter(x, index, hue)
    if augment.gray_p > 0:
        x = _gray(x, index)
    if augment.blur_p > 0:
        x = _blur(x, index, augment.blur_kernel)
    if augment.solarize_p > 0:
        x = _solarize(x, index, augment.solarize_threshold)
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in IMAGENET_MEAN],
        std=[255 * s for s in IMAGENET_STD],
        mirror=_scalar(index, "flip", types.INT32),
    )


@pipeline_def(enable_conditionals=True)
def _graph(views: list[tuple[ViewSpec, Augment]], hue: str, device: str) -> Any:
    images = fn.external_source(name="images", device=device, layout="HWC", ndim=3, dtype=types.UINT8, batch=True)
    return tuple(_view(images, spec, augment, index, hue) for index, (spec, augment) in enumerate(views))


def _fields(augment: Augment, hue: str) -> list[str]:
    """The plan fields that the graph of a view reads; inputs nobody reads would be an error in DALI."""
    fields = ["start", "end", "flip"]
    if augment.jitter_p > 0:
        fields += ["jitter", "brightness", "contrast", "saturation"]
        fields += ["hue"] if hue != "off" else []
    fields += ["gray"] if augment.gray_p > 0 else []
    fields += ["sigma"] if augment.blur_p > 0 else []
    fields += ["solarize"] if augment.solarize_p > 0 else []
    return fields


class Augmenter:
    """Cuts, resizes, distorts and normalises the views of a batch as its plan says.

    Args:
        specs: the views a recipe asked for.
        batch_size: the largest batch that :meth:`run` will be given.
        threads: CPU threads of the DALI pipeline.
        device_id: a CUDA device, or ``None`` for the CPU operators.
        hue: ``hsv`` turns hue exactly, ``yiq`` is DALI's faster approximation, ``off`` leaves hue alone.
    """

    def __init__(
        self, specs: tuple[ViewSpec, ...], *, batch_size: int, threads: int = 1, device_id: int | None = None, hue: Hue = "hsv"
    ) -> None:
        self.specs = specs
        views = [(spec, spec.augment[v % len(spec.augment)]) for spec in specs for v in range(spec.count)]
        self._feeds = [(i, field) for i, (_, augment) in enumerate(views) for field in _fields(augment, hue)]
        self._pipeline = _graph(
            views,
            hue,
            "cpu" if device_id is None else "gpu",
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=1,
            seed=0,
        )
        self._pipeline.build()

    def run(self, images: list[Any], plan: list[ViewPlan]) -> dict[str, list[torch.Tensor]]:
        """Make the views.

        Args:
            images: decoded images, uint8 ``[height, width, 3]`` each, of any sizes.
            plan: one :class:`ViewPlan` a view, in the order of the specs.

        Returns:
            For each spec's name its views, float32 ``[batch, 3, size, size]``, normalised with ImageNet's mean and deviation.
        """
        self._pipeline.feed_input("images", images)
        for index, field in self._feeds:
            self._pipeline.feed_input(_input(index, field), np.ascontiguousarray(getattr(plan[index], field)))
        outputs = [torch.from_dlpack(out.as_tensor()).clone() for out in self._pipeline.run()]
        views: dict[str, list[torch.Tensor]] = {}
        for spec in self.specs:
            views[spec.name] = [outputs.pop(0) for _ in range(spec.count)]
        return views
