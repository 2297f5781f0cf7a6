"""Applies augmentation plans with DALI: decoded images in, normalized crops out. DALI is imported here and in
:mod:`pipeline.data.augment.dali_hue`.

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
from nvidia.dali import fn, math, pipeline_def, tensors, types
from nvidia.dali.pipeline import do_not_convert

from pipeline.config.sizes import height_width
from pipeline.data.augment.dali_hue import Turn, as_bytes, turn_hue, turned_at_once, turned_channels
from pipeline.data.augment.hue import turn_hues
from pipeline.data.augment.plan import ViewPlan
from pipeline.data.augment.view_groups import NOISE, Group, groups_of, input_of
from pipeline.data.augment.views import ChannelSpec, ViewSpec

Hue = Literal["hsv", "yiq", "off"]


def _turn_hue_at_once(image: Any, turns: Any, inputs: _Inputs) -> Any:
    """As :func:`turn_hue`, in one kernel for the whole batch."""
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
def fused_hue(device_id: int) -> Turn | None:
    """What turns the hue in one kernel on this device, if it has just done so for a few images with the pixels of a CPU.

    ``None`` otherwise, and with ``FOVEA_KERNELS=torch``: then it is 64 operators of DALI.
    """
    if os.environ.get("FOVEA_KERNELS") == "torch":
        return None
    try:
        from pipeline.data.augment.hue_triton import turn_hues as turn_at_once

        turn = partial(turned_at_once, turn_at_once)
        problem = _problem_of_fused_hue(device_id, turn)
    except Exception as error:  # of a compiler, a driver or DALI: there is another way
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    if problem:
        text = f"exact hue takes 64 operators of DALI on cuda:{device_id}, not one kernel ({problem})"
        print(f"fovea: {text}; if loading is slow, set method.augment.hue_space=yiq", file=sys.stderr, flush=True)
    return None if problem else turn


def _problem_of_fused_hue(device_id: int | None, turn: Turn) -> str:
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
    turn: Turn | None = None

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


Change = tuple[Any, Callable[[Any], Any]]
"""What an operator does to some samples: the condition, and the change of their images."""


def _jitter(inputs: _Inputs) -> Change:
    brightness, contrast = inputs.array("brightness", types.FLOAT), inputs.array("contrast", types.FLOAT)
    saturation = inputs.array("saturation", types.FLOAT)
    turns: Any = inputs.array("hue", types.FLOAT) if inputs.hue != "off" else None

    def jittered(x: Any) -> Any:
        x = fn.brightness_contrast(x, brightness=brightness)
        mean = fn.reductions.mean(_luma(x))
        # A single operator is six times as fast as arithmetic, with the same pixels, but takes its arguments from the CPU only.
        x = (
            fn.brightness_contrast(x, contrast=contrast, contrast_center=mean)
            if inputs.device == "cpu"
            else as_bytes(x * contrast + mean * (np.float32(1) - contrast))
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
            x = turn_hue(x, turns)
        return x

    return inputs.array("jitter", types.BOOL), jittered


def _gray(inputs: _Inputs) -> Change:
    def grayed(x: Any) -> Any:
        return fn.color_space_conversion(_luma(x), image_type=types.GRAY, output_type=types.RGB)

    return inputs.array("gray", types.BOOL), grayed


def _blur(inputs: _Inputs, *, blur_kernel: int | str) -> Change:
    sigma = inputs.array("sigma", types.FLOAT)

    def blurred(x: Any) -> Any:
        return fn.gaussian_blur(x, window_size=0 if blur_kernel == "auto" else blur_kernel, sigma=sigma)

    return sigma > 0, blurred


def _solarize(inputs: _Inputs, *, solarize_threshold: int) -> Change:
    def solarized(x: Any) -> Any:
        values = [v if v < solarize_threshold else 255 - v for v in range(256)]
        return fn.lookup_table(x, keys=list(range(256)), values=values, dtype=types.UINT8)

    return inputs.array("solarize", types.BOOL), solarized


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


def _channel_jitter(inputs: _Inputs, channels: ChannelSpec) -> Change:
    brightness, contrast = inputs.vector("group_brightness"), inputs.vector("group_contrast")
    condition = inputs.array("jitter", types.BOOL)
    colour = channels.rgb is not None
    # Their scalars, read on the CPU, may be factors of values on a GPU.
    saturation: Any = inputs.array("saturation", types.FLOAT) if colour else None
    turns: Any = inputs.array("hue", types.FLOAT) if colour and inputs.hue != "off" else None
    full = np.float32(channels.full_range)

    def saturated(r: Any, g: Any, b: Any) -> list[Any]:
        gray = _weighted(r, g, b)
        return [_clamped(gray + (one - gray) * saturation, channels) for one in (r, g, b)]

    def turned(r: Any, g: Any, b: Any) -> list[Any]:
        return [one * full for one in turned_channels(r / full, g / full, b / full, turns)]

    def jittered(x: Any) -> Any:
        x = _clamped(x * brightness, channels)
        mean = fn.reductions.mean(x, axes=[0, 1], keep_dims=True)
        x = _clamped(mean + (x - mean) * contrast, channels)
        if colour:
            x = _rgb(x, channels, saturated)
        if turns is not None:
            x = _rgb(x, channels, turned)
        return x

    return condition, jittered


def _channel_gray(inputs: _Inputs, channels: ChannelSpec) -> Change | None:
    if channels.rgb is None:
        return None

    def grayed(x: Any) -> Any:
        return _rgb(x, channels, lambda r, g, b: [_weighted(r, g, b)] * 3)

    return inputs.array("gray", types.BOOL), grayed


def _channel_blur(inputs: _Inputs, channels: ChannelSpec, *, blur_kernel: int | str) -> Change:
    return _blur(inputs, blur_kernel=blur_kernel)


def _channel_solarize(inputs: _Inputs, channels: ChannelSpec, *, solarize_threshold: int) -> Change | None:
    if channels.rgb is None or channels.dtype == "float32":
        return None
    full = np.float32(channels.full_range)
    threshold = np.float32(channels.full_range * solarize_threshold / 255)

    def inverted(*three: Any) -> list[Any]:
        return [one + (full - one - one) * fn.cast(one >= threshold, dtype=types.FLOAT) for one in three]

    def solarized(x: Any) -> Any:
        return _rgb(x, channels, inverted)

    return inputs.array("solarize", types.BOOL), solarized


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
"""What takes the place of :data:`_FUNCTIONS` for declared channels: float32 ``[h, w, channels]`` in and out, values as stored.
``None`` in place of a change: there is none to such channels.
"""
_CHANNEL_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "gain": _channel_gain,
    "noise": _channel_noise,
    "dropout": _channel_dropout,
}
"""What follows: the same, with mean and standard deviation of each channel."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {"jitter": _jitter, "gray": _gray, "blur": _blur, "solarize": _solarize}
"""Each operator's function: :class:`_Inputs` in, its constants by name; the change out, of images uint8 ``[h, w, 3]``.

Inputs must be read outside the change: inside, DALI knows only the samples that meet the condition.
"""


@do_not_convert
def _changes(group: Group, inputs: _Inputs) -> list[Change]:
    """The changes of the images.

    DALI rewrites functions with conditions on samples; each costs every rank a tenth of a CPU second at its start. Only the two
    graphs have such conditions, and nothing else is rewritten.
    """
    changes = [_FUNCTIONS[name](inputs, **dict(constants)) for name, constants in group.operators]
    return [(condition, do_not_convert(change)) for condition, change in changes]


@do_not_convert
def _channel_changes(group: Group, channels: ChannelSpec, inputs: _Inputs) -> list[Change]:
    changes = [_CHANNEL_COLOURS[name](inputs, channels, **dict(constants)) for name, constants in group.operators]
    return [(one[0], do_not_convert(one[1])) for one in changes if one is not None]


@do_not_convert
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


@do_not_convert
def _normalized(x: Any, group: Group, inputs: _Inputs) -> Any:
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in group.normalize.mean],
        std=[255 * s for s in group.normalize.std],
        mirror=inputs.array("flip", types.INT32),
    )


@pipeline_def(enable_conditionals=True)
def _graph(group: Group, inputs: _Inputs) -> Any:
    x = _cut(group, inputs, types.UINT8)
    for condition, change in _changes(group, inputs):
        if condition:
            x = change(x)
    return _normalized(x, group, inputs)


@do_not_convert
def _channel_cut(group: Group, channels: ChannelSpec, inputs: _Inputs) -> Any:
    return _clamped(_cut(group, inputs, types.FLOAT), channels)  # cubic interpolation leaves the range of the values


@do_not_convert
def _channel_normalized(x: Any, group: Group, channels: ChannelSpec, inputs: _Inputs) -> Any:
    full = channels.full_range
    mean, std = ([full * value for value in values] for values in (group.normalize.mean, group.normalize.std))
    centre, width = (types.Constant(np.array(values, np.float32), device=inputs.device) for values in (mean, std))
    for name in group.channel_operators:
        if name in _CHANNEL_FUNCTIONS:
            x = _CHANNEL_FUNCTIONS[name](x, inputs, centre, width)
    return fn.crop_mirror_normalize(
        x, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std, mirror=inputs.array("flip", types.INT32)
    )


@pipeline_def(enable_conditionals=True)
def _channel_graph(group: Group, channels: ChannelSpec, inputs: _Inputs) -> Any:
    """The graph for images of declared channels: values as stored, in float32, up to the normalization at its end."""
    x = _channel_cut(group, channels, inputs)
    for condition, change in _channel_changes(group, channels, inputs):
        if condition:
            x = change(x)
    return _channel_normalized(x, group, channels, inputs)


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
