"""Applies augmentation plans with DALI: decoded images in, normalized crops out. The only module that imports DALI.

The graph has no random operator and no state: it is a pure function of its inputs, and the same graph runs on CPU and GPU.
Colour operations follow torchvision's ColorJitter. DALI's own contrast pivots on a constant, and its hue rotates in YIQ space.
Therefore contrast is computed arithmetically around the image's mean gray, and hue, unless ``hue="yiq"``, in HSV space.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, python_function_plugin, tensors, types
from torch.utils.dlpack import from_dlpack, to_dlpack

from pipeline.config.sizes import height_width
from pipeline.data.augment.hue import turn_hues
from pipeline.data.augment.plan import ViewPlan
from pipeline.data.augment.view_groups import NOISE, Group, groups_of, input_of
from pipeline.data.augment.views import ChannelSpec, ViewSpec

Hue = Literal["hsv", "yiq", "off"]


def _byte(image: Any) -> Any:
    return fn.cast(image, dtype=types.UINT8)


def _hue_channel(sixths: Any, value: Any, chroma: Any, offset: float) -> Any:
    k = sixths + np.float32(offset + 12)
    k = k - math.floor(k * np.float32(1 / 6)) * np.float32(6)
    # clamp() is equivalent but many times slower on a CPU.
    return value - chroma * math.min(math.max(math.min(k, np.float32(4) - k), np.float32(0)), np.float32(1))


def _turn_hue(image: Any, turns: Any) -> Any:
    """Rotates the hue by a fraction of the colour circle, exactly, by channel arithmetic; ``[h, w, 3]`` uint8 in and out.

    For a GPU on which :func:`fused_hue` does not hold: on a CPU the same arithmetic is faster in
    :mod:`pipeline.data.augment.hue`.
    """
    x = fn.cast(image, dtype=types.FLOAT) * np.float32(1 / 255)
    channels = _turned(x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3], turns)
    return _byte(fn.cat(*channels, axis=2) * np.float32(255))


def _turned(r: Any, g: Any, b: Any, turns: Any) -> list[Any]:
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


_Turn = Callable[[Sequence[Any], Sequence[Any]], list[Any]]


def _turned_at_once(
    turn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], images: Sequence[Any], turns: Sequence[Any]
) -> list[Any]:
    """DLPack capsules of images of one size, turned by one call on the stream of the DALI operator that calls this."""
    x, angles = ([from_dlpack(one) for one in batch] for batch in (images, turns))
    device = x[0].device
    stream = torch.cuda.ExternalStream(python_function_plugin.current_dali_stream(), device) if device.type == "cuda" else None
    with torch.cuda.stream(stream):
        return [to_dlpack(one) for one in turn(torch.stack(x), torch.stack(angles)).unbind()]


def _turn_hue_at_once(image: Any, turns: Any, inputs: _Inputs) -> Any:
    """As :func:`_turn_hue`, in one kernel for the whole batch."""
    assert inputs.turn is not None
    return fn.dl_tensor_python_function(
        image,
        turns.gpu() if inputs.device == "gpu" else turns,
        function=inputs.turn,
        device=inputs.device,
        batch_processing=True,
        synchronize_stream=False,
        output_layouts="HWC",
    )


@cache
def fused_hue(device_id: int) -> _Turn | None:
    """What turns the hue in one kernel on this device, if it has just done so for a few images with the pixels of a CPU.

    ``None`` otherwise, and with ``FOVEA_KERNELS=torch``: then it is 64 operators of DALI.
    """
    if os.environ.get("FOVEA_KERNELS") == "torch":
        return None
    try:
        from pipeline.data.augment.hue_triton import turn_hues as turn_at_once

        turn = partial(_turned_at_once, turn_at_once)
        problem = _problem_of_fused_hue(device_id, turn)
    except Exception as error:  # of a compiler, a driver or DALI: there is another way
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    if problem:
        text = f"exact hue takes 64 operators of DALI on cuda:{device_id}, not one kernel ({problem})"
        print(f"fovea: {text}; if loading is slow, set method.augment.hue_space=yiq", file=sys.stderr, flush=True)
    return None if problem else turn


def _problem_of_fused_hue(device_id: int | None, turn: _Turn) -> str:
    """What is wrong with one kernel for the hue; nothing if it gives the pixels of a CPU, in a graph with a condition."""
    turns, chosen = np.array([0.1, 0.0, -0.3, 0.5], np.float32), np.array([True, False, True, True])
    images = list(np.random.default_rng(0).integers(0, 256, (len(turns), 33, 47, 3), dtype=np.uint8))
    expected = [one if use else image for one, image, use in zip(turn_hues(images, list(turns)), images, chosen, strict=True)]
    inputs = _Inputs("hsv", "cpu" if device_id is None else "gpu", read=[], turn=turn)
    pipeline = _hue_graph(inputs, batch_size=len(turns), num_threads=1, device_id=device_id, exec_dynamic=True)
    pipeline.build()
    at = {} if device_id is None else {"cuda_stream": torch.cuda.current_stream(device_id)}
    there = images if device_id is None else [torch.from_numpy(image).to(f"cuda:{device_id}") for image in images]
    pipeline.feed_input("images", [_tensor(image, device_id) for image in there], **at)
    for name, values in {"hue": turns, "jitter": chosen}.items():
        pipeline.feed_input(name, values)
    (out,) = pipeline.run()
    differing = sum(not np.array_equal(np.array(a), b) for a, b in zip(out.as_cpu(), expected, strict=True))
    return f"{differing} of {len(images)} images differ from the CPU's" if differing else ""


@pipeline_def(enable_conditionals=True)
def _hue_graph(inputs: _Inputs) -> Any:
    x = fn.external_source(name="images", device=inputs.device, layout="HWC", ndim=3, dtype=types.UINT8, batch=True)
    turns: Any = inputs.array("hue", types.FLOAT)
    jittered = inputs.array("jitter", types.BOOL)
    if jittered:
        x = _turn_hue_at_once(x, turns, inputs)
    return x


def _tensor(image: Any, device_id: int | None) -> Any:
    return tensors.TensorCPU(image, "HWC") if device_id is None else tensors.TensorGPU(image, "HWC", device_id)


@dataclass(frozen=True)
class _Inputs:
    """The plan arrays that a graph reads, and what an operator must know of the graph.

    Attributes:
        hue, device: as in :class:`Augmenter`; the device is ``cpu`` or ``gpu``.
        turn: what turns the hue in one kernel on a GPU; ``None`` for DALI's operators.
        read: names of the arrays that the graph reads; DALI rejects others.
        pool: threads for what DALI's own threads do not compute; ``None`` for the calling thread.
    """

    hue: str
    device: str
    read: list[str]
    pool: ThreadPoolExecutor | None = None
    turn: _Turn | None = None

    def array(self, name: str, dtype: Any, ndim: int = 0) -> Any:
        """An array of the plan as input of the graph: one number per sample, or with ``ndim=1`` a vector."""
        self.read.append(name)
        return fn.external_source(name=name, ndim=ndim, dtype=dtype, batch=True)

    def vector(self, name: str) -> Any:
        """An array of the plan with one number per channel of a sample, where the images are."""
        vector = self.array(name, types.FLOAT, ndim=1)
        return vector.gpu() if self.device == "gpu" else vector


def _luma(image: Any) -> Any:
    return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)


def _jitter(x: Any, inputs: _Inputs) -> Any:
    brightness, contrast = inputs.array("brightness", types.FLOAT), inputs.array("contrast", types.FLOAT)
    saturation = inputs.array("saturation", types.FLOAT)
    turns: Any = inputs.array("hue", types.FLOAT) if inputs.hue != "off" else None
    jittered = inputs.array("jitter", types.BOOL)
    if jittered:
        x = fn.brightness_contrast(x, brightness=brightness)
        mean = fn.reductions.mean(_luma(x))
        # A single operator is six times as fast as arithmetic, with the same pixels, but takes its arguments from the CPU only.
        x = (
            fn.brightness_contrast(x, contrast=contrast, contrast_center=mean)
            if inputs.device == "cpu"
            else _byte(x * contrast + mean * (np.float32(1) - contrast))
        )
        if inputs.hue == "yiq":
            x = fn.color_twist(x, saturation=saturation, hue=turns * np.float32(360))
        else:
            x = fn.color_twist(x, saturation=saturation)
        if inputs.hue == "hsv" and inputs.device == "cpu":
            turn = partial(turn_hues, pool=inputs.pool)
            x = fn.python_function(x, turns, function=turn, batch_processing=True, num_outputs=1, output_layouts="HWC")
        elif inputs.hue == "hsv" and inputs.turn is not None:
            x = _turn_hue_at_once(x, turns, inputs)
        elif inputs.hue == "hsv":
            x = _turn_hue(x, turns)
    return x


def _gray(x: Any, inputs: _Inputs) -> Any:
    grayed = inputs.array("gray", types.BOOL)
    if grayed:
        x = fn.color_space_conversion(_luma(x), image_type=types.GRAY, output_type=types.RGB)
    return x


def _blur(x: Any, inputs: _Inputs, *, blur_kernel: int | str) -> Any:
    sigma = inputs.array("sigma", types.FLOAT)
    if sigma > 0:
        x = fn.gaussian_blur(x, window_size=0 if blur_kernel == "auto" else blur_kernel, sigma=sigma)
    return x


def _solarize(x: Any, inputs: _Inputs, *, solarize_threshold: int) -> Any:
    solarized = inputs.array("solarize", types.BOOL)
    if solarized:
        values = [v if v < solarize_threshold else 255 - v for v in range(256)]
        x = fn.lookup_table(x, keys=list(range(256)), values=values, dtype=types.UINT8)
    return x


def _clamped(x: Any, channels: ChannelSpec) -> Any:
    """Values within the range of an integer type; float32 has no range."""
    if channels.dtype == "float32":
        return x
    return math.min(math.max(x, np.float32(0)), np.float32(channels.full_range))


def _rgb(x: Any, channels: ChannelSpec, function: Callable[[Any, Any, Any], Sequence[Any]]) -> Any:
    """Replaces the red, green and blue channel, and leaves the others as they are."""
    if channels.rgb is None:
        return x
    parts = [x[:, :, c : c + 1] for c in range(channels.count)]
    changed = function(*(parts[c] for c in channels.rgb))
    replaced = {channels.rgb[number]: changed[number] for number in range(3)}
    return fn.cat(*[replaced.get(c, parts[c]) for c in range(channels.count)], axis=2)


def _weighted(r: Any, g: Any, b: Any) -> Any:
    return r * np.float32(0.299) + g * np.float32(0.587) + b * np.float32(0.114)


def _channel_jitter(x: Any, inputs: _Inputs, channels: ChannelSpec) -> Any:
    brightness, contrast = inputs.vector("group_brightness"), inputs.vector("group_contrast")
    jittered = inputs.array("jitter", types.BOOL)
    colour = channels.rgb is not None
    # Their scalars, read on the CPU, may be factors of values on a GPU.
    saturation: Any = inputs.array("saturation", types.FLOAT) if colour else None
    turns: Any = inputs.array("hue", types.FLOAT) if colour and inputs.hue != "off" else None
    full = np.float32(channels.full_range)

    def saturated(r: Any, g: Any, b: Any) -> list[Any]:
        gray = _weighted(r, g, b)
        return [_clamped(gray + (one - gray) * saturation, channels) for one in (r, g, b)]

    def turned(r: Any, g: Any, b: Any) -> list[Any]:
        return [one * full for one in _turned(r / full, g / full, b / full, turns)]

    if jittered:
        x = _clamped(x * brightness, channels)
        mean = fn.reductions.mean(x, axes=[0, 1], keep_dims=True)
        x = _clamped(mean + (x - mean) * contrast, channels)
        if colour:
            x = _rgb(x, channels, saturated)
        if turns is not None:
            x = _rgb(x, channels, turned)
    return x


def _channel_gray(x: Any, inputs: _Inputs, channels: ChannelSpec) -> Any:
    if channels.rgb is None:
        return x
    grayed = inputs.array("gray", types.BOOL)
    if grayed:
        x = _rgb(x, channels, lambda r, g, b: [_weighted(r, g, b)] * 3)
    return x


def _channel_blur(x: Any, inputs: _Inputs, channels: ChannelSpec, *, blur_kernel: int | str) -> Any:
    return _blur(x, inputs, blur_kernel=blur_kernel)


def _channel_solarize(x: Any, inputs: _Inputs, channels: ChannelSpec, *, solarize_threshold: int) -> Any:
    if channels.rgb is None or channels.dtype == "float32":
        return x
    solarized = inputs.array("solarize", types.BOOL)
    full = np.float32(channels.full_range)
    threshold = np.float32(channels.full_range * solarize_threshold / 255)

    def inverted(*three: Any) -> list[Any]:
        return [one + (full - one - one) * fn.cast(one >= threshold, dtype=types.FLOAT) for one in three]

    if solarized:
        x = _rgb(x, channels, inverted)
    return x


def _channel_gain(x: Any, inputs: _Inputs, mean: Any, std: Any) -> Any:
    return mean + (x - mean) * inputs.vector("gain") + std * inputs.vector("offset")


def _channel_noise(x: Any, inputs: _Inputs, mean: Any, std: Any) -> Any:
    noise = inputs.array(NOISE, types.FLOAT, ndim=3)
    return x + (noise.gpu() if inputs.device == "gpu" else noise) * std


def _channel_dropout(x: Any, inputs: _Inputs, mean: Any, std: Any) -> Any:
    return mean + (x - mean) * inputs.vector("channel_kept")


_CHANNEL_COLOURS: dict[str, Callable[..., Any]] = {
    "jitter": _channel_jitter,
    "gray": _channel_gray,
    "blur": _channel_blur,
    "solarize": _channel_solarize,
}
"""What takes the place of :data:`_FUNCTIONS` for declared channels: float32 ``[h, w, channels]`` in and out, values as stored."""
_CHANNEL_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "gain": _channel_gain,
    "noise": _channel_noise,
    "dropout": _channel_dropout,
}
"""What follows: the same, with mean and standard deviation of each channel."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {"jitter": _jitter, "gray": _gray, "blur": _blur, "solarize": _solarize}
"""Each operator's function: images and :class:`_Inputs` in, its constants by name; images out, uint8 ``[h, w, 3]``.

Inputs must be read outside a condition on samples: inside, DALI knows only those samples.
"""


def _cut(group: Group, inputs: _Inputs, dtype: Any) -> Any:
    """The crops of the images, resized to the size of the views."""
    # Each image is fed once for each of its views, always the same bytes: they must not be copied.
    images = fn.external_source(name="images", device=inputs.device, layout="HWC", ndim=3, dtype=dtype, batch=True, no_copy=True)
    return fn.resize(
        images,
        roi_start=inputs.array("start", types.FLOAT, ndim=1),
        roi_end=inputs.array("end", types.FLOAT, ndim=1),
        size=list(height_width(group.size)),
        interp_type=types.INTERP_CUBIC if group.interpolation == "bicubic" else types.INTERP_LINEAR,
        antialias=True,
    )


@pipeline_def(enable_conditionals=True)
def _graph(group: Group, inputs: _Inputs) -> Any:
    x = _cut(group, inputs, types.UINT8)
    for name, constants in group.operators:
        x = _FUNCTIONS[name](x, inputs, **dict(constants))
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in group.normalize.mean],
        std=[255 * s for s in group.normalize.std],
        mirror=inputs.array("flip", types.INT32),
    )


@pipeline_def(enable_conditionals=True)
def _channel_graph(group: Group, channels: ChannelSpec, inputs: _Inputs) -> Any:
    """The graph for images of declared channels: values as stored, in float32, up to the normalization at its end."""
    x = _cut(group, inputs, types.FLOAT)
    x = _clamped(x, channels)  # cubic interpolation leaves the range of the values
    for name, constants in group.operators:
        x = _CHANNEL_COLOURS[name](x, inputs, channels, **dict(constants))
    full = channels.full_range
    mean, std = ([full * value for value in values] for values in (group.normalize.mean, group.normalize.std))
    centre, width = (types.Constant(np.array(values, np.float32), device=inputs.device) for values in (mean, std))
    for name in group.channel_operators:
        if name in _CHANNEL_FUNCTIONS:
            x = _CHANNEL_FUNCTIONS[name](x, inputs, centre, width)
    return fn.crop_mirror_normalize(
        x, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std, mirror=inputs.array("flip", types.INT32)
    )


class Augmenter:
    """Crops, resizes, augments and normalizes the views of a batch according to its plan.

    Views of one size share one DALI pipeline: for small views, half of the time is operator overhead.

    Args:
        sets: the views of a method; several sets if it mixes sizes. Pipelines are shared between sets where possible.
        batch_size: maximum batch size of :meth:`run`.
        threads: CPU threads of each DALI pipeline.
        device_id: a CUDA device, or ``None`` for the CPU operators.
        hue: ``hsv`` rotates hue exactly, ``yiq`` is DALI's approximation, ``off`` leaves hue unchanged.
    """

    def __init__(
        self, *sets: tuple[ViewSpec, ...], batch_size: int, threads: int = 1, device_id: int | None = None, hue: Hue = "hsv"
    ) -> None:
        self._device_id = device_id
        # Of earlier runs: an event, and what is read until then.
        self._in_use: deque[tuple[torch.cuda.Event | None, Any]] = deque()
        self._pipelines: dict[Group, tuple[Any, list[str]]] = {}
        self._make = partial(self._build, samples=batch_size, threads=threads, device_id=device_id, hue=hue)
        self.use(*sets)

    def use(self, *sets: tuple[ViewSpec, ...]) -> None:
        """Changes the sets: keeps the pipelines that they share with those before, builds the others, and releases the rest with
        its memory.

        On a GPU it waits until the calling thread's current stream has read what the pipelines made.
        """
        if self._device_id is not None and self._pipelines:
            torch.cuda.current_stream(self._device_id).synchronize()
        self._in_use.clear()
        self._sets = {specs: groups_of(specs) for specs in sets}
        groups = dict.fromkeys(group for groups in self._sets.values() for group in groups)
        self._pipelines = {group: pipeline for group, pipeline in self._pipelines.items() if group in groups}
        self._pipelines = {group: self._pipelines.get(group) or self._make(group) for group in groups}

    @staticmethod
    def _build(group: Group, *, samples: int, threads: int, device_id: int | None, hue: str) -> tuple[Any, list[str]]:
        """Builds the graph of a group for up to so many samples; returns it with the names of the plan arrays that it reads."""
        pool = ThreadPoolExecutor(threads, "fovea-hue") if hue == "hsv" and device_id is None and threads > 1 else None
        jitters = group.channels is None and any(name == "jitter" for name, _ in group.operators)
        turn = fused_hue(device_id) if device_id is not None and hue == "hsv" and jitters else None
        inputs = _Inputs(hue, "cpu" if device_id is None else "gpu", read=[], pool=pool, turn=turn)
        options: dict[str, Any] = {
            "batch_size": samples * len(group.views),
            "num_threads": threads,
            "device_id": device_id,
            "prefetch_queue_depth": 1,
            "exec_dynamic": True,
            "seed": 0,
        }
        channels = group.channels
        pipeline = _graph(group, inputs, **options) if channels is None else _channel_graph(group, channels, inputs, **options)
        pipeline.build()
        return pipeline, inputs.read

    def run(
        self, images: list[Any], plan: list[ViewPlan], specs: tuple[ViewSpec, ...] | None = None
    ) -> dict[str, list[torch.Tensor]]:
        """Computes the views; on a GPU for the calling thread's current stream, on which the images were decoded.

        Args:
            images: decoded images, uint8 ``[height, width, 3]`` each, of any sizes; of views with declared channels float32
                ``[height, width, channels]``, values as stored.
            plan: one :class:`ViewPlan` per view, in the order of the specs.
            specs: which of the sets; by default the first.

        Returns:
            For each spec's name its views, float32 ``[batch, channels, height, width]``, normalized as the spec says.
        """
        specs = next(iter(self._sets)) if specs is None else specs
        pipelines = [(group, *self._pipelines[group]) for group in self._sets[specs]]
        arrays = [view.arrays for view in plan]
        stream: torch.cuda.Stream | None = None
        options: dict[str, Any] = {}
        fed = [_tensor(image, self._device_id) for image in images]
        if self._device_id is not None:
            stream = torch.cuda.current_stream(self._device_id)
            options = {"cuda_stream": stream}
            stream.synchronize()  # images are read in place, by other streams: they must be complete now
        for group, pipeline, names in pipelines:
            pipeline.feed_input("images", fed * len(group.views), **options)
            for name in names:
                pipeline.feed_input(name, input_of(group, name, arrays))
            pipeline.schedule_run()
        made: dict[int, torch.Tensor] = {}
        read: list[Any] = [fed]
        for group, pipeline, _ in pipelines:
            (out,) = pipeline.outputs(**options)
            joint = torch.from_dlpack(out.as_tensor())
            # The executor gives up its buffers and never writes to them again, as long as they are held.
            if stream is not None:
                read += [out, joint]
                joint = joint.clone()
            made |= zip(group.views, joint.split(len(images)), strict=True)
        self._hold(stream, read)
        numbers = iter(range(len(plan)))
        return {spec.name: [made[next(numbers)] for _ in range(spec.count)] for spec in specs}

    def _hold(self, stream: torch.cuda.Stream | None, read: list[Any]) -> None:
        """Holds what a run reads, images and buffers of the pipelines, until its copies on the stream have ended.

        A buffer that is released earlier goes to the next pipeline, which may write to it before it is copied.
        """
        while self._in_use and ((done := self._in_use[0][0]) is None or done.query()):
            self._in_use.popleft()
        self._in_use.append((None if stream is None else stream.record_event(), read))
