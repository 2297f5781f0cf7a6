"""The views of images with declared channels, computed in NumPy in double precision."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.plan import ViewPlan
from pipeline.data.augment.view_groups import noise_of
from pipeline.data.augment.views import ViewSpec

Array = NDArray[np.float64]


def weights(size: int, start: float, end: float, out: int, interpolation: str) -> Array:
    """Antialiased resampling of ``[start, end)`` to ``out`` samples, ``[out, size]``; the border value goes on."""
    scale = (end - start) / out
    stretch = max(scale, 1.0)
    radius = (2.0 if interpolation == "bicubic" else 1.0) * stretch
    matrix = np.zeros((out, size))
    for row in range(out):
        centre = start + (row + 0.5) * scale
        taps = np.arange(np.floor(centre - radius) - 1, np.ceil(centre + radius) + 2)
        t = np.abs((taps + 0.5 - centre) / stretch)
        if interpolation == "bicubic":
            value = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))
        else:
            value = np.clip(1 - t, 0, None)
        np.add.at(matrix[row], np.clip(taps, 0, size - 1).astype(int), value / value.sum())
    return matrix


def blurred(x: Array, sigma: float, window: int) -> Array:
    taps = np.exp(-0.5 * ((np.arange(window) - window // 2) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        pad = [(0, 0)] * 3
        pad[axis] = (window // 2, window // 2)
        padded = np.pad(x, pad, mode="reflect")
        x = sum(taps[n] * np.take(padded, range(n, n + x.shape[axis]), axis=axis) for n in range(window))
    return x


def view(image: NDArray[Any], spec: ViewSpec, plan: ViewPlan, row: int, *, blur_kernel: int = 9) -> Array:
    """One view of one image, ``[channels, height, width]``."""
    channels, augment = spec.channels, spec.augment[0]
    assert channels is not None
    full, arrays = channels.full_range, {name: array[row] for name, array in plan.arrays.items()}

    def clamped(x: Array) -> Array:
        return x if channels.dtype == "float32" else np.clip(x, 0, full)

    down = weights(image.shape[0], arrays["start"][0], arrays["end"][0], spec.shape[0], spec.interpolation)
    across = weights(image.shape[1], arrays["start"][1], arrays["end"][1], spec.shape[1], spec.interpolation)
    x = clamped(np.einsum("yh,hwc,xw->yxc", down, image.astype(np.float64), across))
    rgb = list(channels.rgb or ())
    luma = np.array([0.299, 0.587, 0.114])
    if arrays["jitter"]:
        x = clamped(x * arrays["group_brightness"])
        mean = x.mean((0, 1))
        x = clamped(mean + (x - mean) * arrays["group_contrast"])
        if rgb:
            gray = (x[:, :, rgb] @ luma)[:, :, None]
            x[:, :, rgb] = clamped(gray + (x[:, :, rgb] - gray) * arrays["saturation"])
            flat = x[:, :, rgb].reshape(-1, 3) / full
            for number, (r, g, b) in enumerate(flat.tolist()):
                h, s, v = colorsys.rgb_to_hsv(r, g, b)
                flat[number] = colorsys.hsv_to_rgb((h + arrays["hue"]) % 1, s, v)
            x[:, :, rgb] = flat.reshape(*x.shape[:2], 3) * full
    if rgb and arrays["gray"]:
        x[:, :, rgb] = (x[:, :, rgb] @ luma)[:, :, None]
    if arrays["sigma"] > 0:
        x = blurred(x, float(arrays["sigma"]), blur_kernel)
    if rgb and channels.dtype != "float32" and arrays["solarize"]:
        part = x[:, :, rgb]
        x[:, :, rgb] = np.where(part >= full * augment.solarize_threshold / 255, full - part, part)
    mean, std = full * np.array(spec.normalize.mean), full * np.array(spec.normalize.std)
    y = (x - mean) / std
    if "gain" in arrays:
        y = y * arrays["gain"] + arrays["offset"]
    if "noise_sigma" in arrays:
        (noise,) = noise_of(plan.values["noise_sigma"][row : row + 1], plan.values["noise_seed"][row : row + 1], x.shape)
        y = y + noise
    if "channel_kept" in arrays:
        y = y * arrays["channel_kept"]
    y = y[:, ::-1] if arrays["flip"] else y
    return y.transpose(2, 0, 1)
