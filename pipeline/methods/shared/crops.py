"""Converts settings to view specifications, for conversions that several methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

from pipeline.config.sizes import shortest_side
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.settings import GLOBAL_VIEWS, AugmentSettings, CurriculumStage, MultiCropSettings
from pipeline.data.augment.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    MaskSpec,
    Normalize,
    PatchDropout,
    ViewSpec,
    ViewStage,
)
from pipeline.errors import ConfigError
from pipeline.methods.settings import MethodSettings, OneViewSettings

_S = TypeVar("_S", bound=MethodSettings)
_KERNEL = 9  # of DINOv2's blur, pixels
NORMALIZE = {
    "openai": Normalize(OPENAI_MEAN, OPENAI_STD),
    "imagenet": Normalize(IMAGENET_MEAN, IMAGENET_STD),
    "none": Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_SHARED = [field.name for field in fields(Augment) if field.name in AugmentSettings.model_fields]
"""Fields of :class:`Augment` that are settings of the same name."""


def global_augments(a: AugmentSettings, *, blur_kernel: int | Literal["auto"] = _KERNEL) -> tuple[Augment, ...]:
    """Augmentation of each global view; a single one where all views share theirs.

    Args:
        a: the settings.
        blur_kernel: see :class:`Augment`.
    """
    per_view = [len(value) for name in _SHARED if isinstance(value := getattr(a, name), tuple)]
    return tuple(_augment(a, view, blur_kernel) for view in range(max(per_view)))


def local_augment(a: AugmentSettings, *, blur_kernel: int | Literal["auto"] = _KERNEL) -> Augment:
    """Augmentation of a local crop; arguments as for :func:`global_augments`.

    What the two global views may have different values of, a local crop has only where a setting ``local_…`` says so.
    """
    return _augment(a, None, blur_kernel)


def _augment(a: AugmentSettings, view: int | None, blur_kernel: int | Literal["auto"]) -> Augment:
    values: dict[str, Any] = {"blur_kernel": blur_kernel}
    for name in _SHARED:
        value = getattr(a, name)
        if not isinstance(value, tuple):
            values[name] = value
        elif view is not None:
            values[name] = value[view % len(value)]
        elif hasattr(a, f"local_{name}"):
            values[name] = getattr(a, f"local_{name}")
    if a.hue_space == "off":
        values["hue_shift"] = 0.0
    return Augment(**values)


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
        blur_kernel: width of the blur kernel in pixels for a view whose shorter side is given.
        mask: block masks of the global crops.
    """
    normalize = NORMALIZE[a.normalize]
    both = global_augments(a, blur_kernel=blur_kernel(shortest_side(v.global_size)))
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
        small = local_augment(a, blur_kernel=blur_kernel(shortest_side(v.local_size)))
        views.append(
            ViewSpec(
                "local", v.local_count, v.local_size, v.local_scale, (small,), normalize=normalize, interpolation=v.interpolation
            )
        )
    return tuple(views)


def view_stages(settings: _S, views: Callable[[_S], tuple[ViewSpec, ...]], *, patch: int | None = None) -> tuple[ViewStage, ...]:
    """The stages of ``views.curriculum``, each with the views that the method would have if these sizes were the full ones.

    Args:
        settings: the method's settings.
        views: returns the method's views for its settings.
        patch: patch side in pixels of a tower whose patches can be dropped.

    Raises:
        ConfigError: a stage drops patches, and there are none that can be.
    """

    def dropping(stage: CurriculumStage) -> tuple[ViewSpec, ...]:
        specs = views(settings.at_stage(stage))
        if not stage.patch_dropout:
            return specs
        if patch is None:
            raise ConfigError(
                "the method or its backbone has no patches to drop",
                where="method.views.curriculum",
                hint="Set patch_dropout to 0, or choose a vision transformer and a method that drops patches",
            )
        first = replace(specs[0], dropout=PatchDropout(patch, stage.patch_dropout))  # the global views
        return (first, *specs[1:])

    return tuple(ViewStage(dropping(stage), stage.until) for stage in settings.views.curriculum)


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
