"""Converts settings to view specifications, for conversions that several methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pipeline.data.augment.settings import GLOBAL_VIEWS, AugmentSettings, MultiCropSettings
from pipeline.data.augment.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    Augment,
    MaskSpec,
    Normalize,
    ViewSpec,
)
from pipeline.methods.settings import OneViewSettings

_KERNEL = 9  # of DINOv2's blur, pixels
NORMALIZE = {
    "openai": Normalize(OPENAI_MEAN, OPENAI_STD),
    "imagenet": Normalize(IMAGENET_MEAN, IMAGENET_STD),
    "none": Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def global_augments(a: AugmentSettings, *, blur_kernel: int | Literal["auto"] = _KERNEL) -> tuple[Augment, ...]:
    """Augmentation of each global view; a single one where all views share theirs.

    Args:
        a: the settings.
        blur_kernel: see :class:`Augment`.
    """
    count = max(len(a.blur_probability), len(a.solarize_probability))
    return tuple(
        replace(
            local_augment(a, blur_kernel=blur_kernel),
            blur_p=a.blur_probability[view % len(a.blur_probability)],
            solarize_p=a.solarize_probability[view % len(a.solarize_probability)],
        )
        for view in range(count)
    )


def local_augment(a: AugmentSettings, *, blur_kernel: int | Literal["auto"] = _KERNEL) -> Augment:
    """Augmentation of a local crop, which is never solarized; arguments as for :func:`global_augments`."""
    return Augment(
        flip_p=a.flip_probability,
        jitter_p=a.jitter_probability,
        brightness=a.brightness,
        contrast=a.contrast,
        saturation=a.saturation,
        hue=a.hue_shift if a.hue_space != "off" else 0.0,
        gray_p=a.gray_probability,
        blur_p=a.local_blur_probability,
        blur_kernel=blur_kernel,
    )


def multi_crop(
    v: MultiCropSettings,
    a: AugmentSettings,
    *,
    blur_kernel: Callable[[int], int] = lambda _: _KERNEL,
    mask: MaskSpec | None = None,
) -> tuple[ViewSpec, ...]:
    """Two global crops, each with its augmentation, and local crops if ``local_count`` is set.

    Args:
        v: sizes, counts and scales.
        a: augmentation.
        blur_kernel: width of the blur kernel in pixels for a view of the given side.
        mask: block masks of the global crops.
    """
    normalize = NORMALIZE[a.normalize]
    both = global_augments(a, blur_kernel=blur_kernel(v.global_size))
    views = [
        ViewSpec(
            "global",
            GLOBAL_VIEWS,
            v.global_size,
            v.global_scale,
            both,
            mask=mask,
            normalize=normalize,
            interpolation=v.interpolation,
        )
    ]
    if v.local_count:
        small = local_augment(a, blur_kernel=blur_kernel(v.local_size))
        views.append(
            ViewSpec(
                "local", v.local_count, v.local_size, v.local_scale, (small,), normalize=normalize, interpolation=v.interpolation
            )
        )
    return tuple(views)


def one_view(s: OneViewSettings) -> tuple[ViewSpec, ...]:
    """One crop of nearly the whole image, for methods whose captions describe all of it."""
    v = s.views
    return (
        ViewSpec(
            "image",
            1,
            v.global_size,
            v.global_scale,
            global_augments(s.augment),
            normalize=NORMALIZE[s.augment.normalize],
            interpolation=v.interpolation,
        ),
    )
