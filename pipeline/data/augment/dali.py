"""Applies augmentation plans with DALI: decoded images in, normalized crops out. The only module that imports DALI.

The graph has no random operator and no state: it is a pure function of its inputs, and the same graph runs on CPU and GPU.
Colour operations follow torchvision's ColorJitter. DALI's own contrast pivots on a constant, and its hue rotates in YIQ space.
Therefore contrast is computed arithmetically around the image's mean gray, and hue, unless ``hue="yiq"``, in HSV space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, tensors, types

from pipeline.data.augment.plan import ViewPlan
from pipeline.data.augment.views import Normalize, ViewSpec

Hue = Literal["hsv", "yiq", "off"]


def _byte(image: Any) -> Any:
    return fn.cast(image, dtype=types.UINT8)


def _hue_channel(sixths: Any, value: Any, chroma: Any, offset: float) -> Any:
    k = sixths + np.float32(offset + 12)
    k = k - math.floor(k * np.float32(1 / 6)) * np.float32(6)
    # clamp() is equivalent but many times slower on a CPU.
    return value - chroma * math.min(math.max(math.min(k, np.float32(4) - k), np.float32(0)), np.float32(1))


def _turn_hue(image: Any, turns: Any) -> Any:
    """Rotates the hue by a fraction of the colour circle, exactly, by channel arithmetic; ``[h, w, 3]`` uint8 in and out."""
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


def _scalar(field: str, dtype: Any) -> Any:
    return fn.external_source(name=field, ndim=0, dtype=dtype, batch=True)


def _luma(image: Any) -> Any:
    return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)


def _jitter(x: Any, hue: str, device: str) -> Any:
    brightness, contrast = _scalar("brightness", types.FLOAT), _scalar("contrast", types.FLOAT)
    saturation = _scalar("saturation", types.FLOAT)
    turns: Any = _scalar("hue", types.FLOAT) if hue != "off" else None
    jittered = _scalar("jitter", types.BOOL)
    if jittered:
        x = fn.brightness_contrast(x, brightness=brightness)
        mean = fn.reductions.mean(_luma(x))
        # A single operator is six times as fast as arithmetic, with the same pixels, but takes its arguments from the CPU only.
        x = (
            fn.brightness_contrast(x, contrast=contrast, contrast_center=mean)
            if device == "cpu"
            else _byte(x * contrast + mean * (np.float32(1) - contrast))
        )
        if hue == "yiq":
            x = fn.color_twist(x, saturation=saturation, hue=turns * np.float32(360))
        else:
            x = fn.color_twist(x, saturation=saturation)
        if hue == "hsv":
            x = _turn_hue(x, turns)
    return x


def _gray(x: Any) -> Any:
    grayed = _scalar("gray", types.BOOL)
    if grayed:
        x = fn.color_space_conversion(_luma(x), image_type=types.GRAY, output_type=types.RGB)
    return x


def _blur(x: Any, kernel: int | str) -> Any:
    sigma = _scalar("sigma", types.FLOAT)
    if sigma > 0:
        x = fn.gaussian_blur(x, window_size=0 if kernel == "auto" else kernel, sigma=sigma)
    return x


def _solarize(x: Any, threshold: int) -> Any:
    solarized = _scalar("solarize", types.BOOL)
    if solarized:
        values = [v if v < threshold else 255 - v for v in range(256)]
        x = fn.lookup_table(x, keys=list(range(256)), values=values, dtype=types.UINT8)
    return x


@dataclass(frozen=True)
class _Group:
    """Views that one graph processes as one long batch, view after view; they differ only in their plans.

    Attributes:
        views: their positions in the plan.
        size, normalize, interpolation: as in :class:`ViewSpec`.
        kernel, threshold: of blur and solarization.
        fields: the plan's fields that the graph reads; DALI rejects unused inputs.
    """

    views: tuple[int, ...]
    size: int
    normalize: Normalize
    kernel: int | str
    threshold: int
    interpolation: str
    fields: tuple[str, ...]


def _groups(specs: tuple[ViewSpec, ...], hue: str) -> list[_Group]:
    """Groups views by what the graph must be built for; views without blur fit any blur kernel."""
    views = [(spec, spec.augment[v % len(spec.augment)]) for spec in specs for v in range(spec.count)]
    members_by_kind: dict[Any, list[int]] = {}
    for index, (spec, augment) in enumerate(views):
        members_by_kind.setdefault(
            (spec.size, spec.normalize, augment.blur_kernel, augment.solarize_threshold, spec.interpolation), []
        ).append(index)
    groups = []
    for (size, normalize, kernel, threshold, interpolation), members in members_by_kind.items():
        augments = [views[index][1] for index in members]
        fields = ["start", "end", "flip"]
        if any(augment.jitter_p > 0 for augment in augments):
            fields += ["jitter", "brightness", "contrast", "saturation", *(["hue"] if hue != "off" else [])]
        for field, name in (("gray", "gray_p"), ("sigma", "blur_p"), ("solarize", "solarize_p")):
            fields += [field] if any(getattr(augment, name) > 0 for augment in augments) else []
        groups.append(_Group(tuple(members), size, normalize, kernel, threshold, interpolation, tuple(fields)))
    return groups


@pipeline_def(enable_conditionals=True)
def _graph(group: _Group, hue: str, device: str) -> Any:
    # Each image is fed once for each of its views, always the same bytes: they must not be copied.
    images = fn.external_source(name="images", device=device, layout="HWC", ndim=3, dtype=types.UINT8, batch=True, no_copy=True)
    x = fn.resize(
        images,
        roi_start=fn.external_source(name="start", ndim=1, dtype=types.FLOAT, batch=True),
        roi_end=fn.external_source(name="end", ndim=1, dtype=types.FLOAT, batch=True),
        size=[group.size, group.size],
        interp_type=types.INTERP_CUBIC if group.interpolation == "bicubic" else types.INTERP_LINEAR,
        antialias=True,
    )
    if "jitter" in group.fields:
        x = _jitter(x, hue, device)
    if "gray" in group.fields:
        x = _gray(x)
    if "sigma" in group.fields:
        x = _blur(x, group.kernel)
    if "solarize" in group.fields:
        x = _solarize(x, group.threshold)
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in group.normalize.mean],
        std=[255 * s for s in group.normalize.std],
        mirror=_scalar("flip", types.INT32),
    )


class Augmenter:
    """Crops, resizes, augments and normalizes the views of a batch according to its plan.

    Views of one size share one DALI pipeline: for small views, half of the time is operator overhead.

    Args:
        sets: the views of a method; several sets if it mixes sizes. Pipelines are shared between sets where possible.
        batch_size: maximum batch size of :meth:`run`.
        threads: CPU threads of each DALI pipeline.
        device_id: a CUDA device, or ``None`` for the CPU operators.
        hue: ``hsv`` rotates hue exactly, ``yiq`` is DALI's faster approximation, ``off`` leaves hue unchanged.
    """

    def __init__(
        self, *sets: tuple[ViewSpec, ...], batch_size: int, threads: int = 1, device_id: int | None = None, hue: Hue = "hsv"
    ) -> None:
        self._sets = {specs: _groups(specs, hue) for specs in sets}
        self._on_cpu, self._device_id = device_id is None, device_id
        self._fed: list[Any] = []
        self._pipelines = {
            group: self._build(group, batch_size * len(group.views), threads, device_id, hue)
            for group in dict.fromkeys(group for groups in self._sets.values() for group in groups)
        }

    @staticmethod
    def _build(group: _Group, batch_size: int, threads: int, device_id: int | None, hue: str) -> Any:
        pipeline = _graph(
            group,
            hue,
            "cpu" if device_id is None else "gpu",
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=1,
            exec_dynamic=True,
            seed=0,
        )
        pipeline.build()
        return pipeline

    def run(
        self, images: list[Any], plan: list[ViewPlan], specs: tuple[ViewSpec, ...] | None = None
    ) -> dict[str, list[torch.Tensor]]:
        """Computes the views.

        Args:
            images: decoded images, uint8 ``[height, width, 3]`` each, of any sizes.
            plan: one :class:`ViewPlan` per view, in the order of the specs.
            specs: which of the sets; by default the first.

        Returns:
            For each spec's name its views, float32 ``[batch, 3, size, size]``, normalized as the spec says.
        """
        tensor = tensors.TensorCPU if self._on_cpu else tensors.TensorGPU
        # Read in place: they must be complete now, and stay alive until the pipelines have read them.
        self._fed = fed = [tensor(image, "HWC") for image in images]
        if not self._on_cpu:
            torch.cuda.current_stream(self._device_id).synchronize()
        specs = next(iter(self._sets)) if specs is None else specs
        pipelines = [(group, self._pipelines[group]) for group in self._sets[specs]]
        for group, pipeline in pipelines:
            pipeline.feed_input("images", fed * len(group.views))
            for field in group.fields:
                pipeline.feed_input(field, np.concatenate([getattr(plan[view], field) for view in group.views]))
            pipeline.schedule_run()
        made: dict[int, torch.Tensor] = {}
        for group, pipeline in pipelines:
            (out,) = pipeline.outputs()
            joint = torch.from_dlpack(out.as_tensor())
            # The executor gives up its buffers and never writes to them again; on a GPU the copy also orders the streams.
            made |= zip(group.views, (joint if self._on_cpu else joint.clone()).split(len(images)), strict=True)
        numbers = iter(range(len(plan)))
        return {spec.name: [made[next(numbers)] for _ in range(spec.count)] for spec in specs}
