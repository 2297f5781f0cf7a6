"""Converts settings to view specifications, for conversions that several methods share."""

from __future__ import annotations

from pipeline.data.augment.views import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD, Augment, Normalize, ViewSpec
from pipeline.methods.clip.settings import ClipSettings
from pipeline.methods.coca.settings import CocaSettings
from pipeline.methods.settings import AugmentSettings
from pipeline.methods.shared.two_views_settings import ColourSettings
from pipeline.methods.simvlm.settings import SimvlmSettings

NORMALIZE = {
    "openai": Normalize(OPENAI_MEAN, OPENAI_STD),
    "imagenet": Normalize(IMAGENET_MEAN, IMAGENET_STD),
    "none": Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def colours(a: AugmentSettings | ColourSettings) -> Augment:
    """Flip, jitter and grayscale from the settings; each method adds blur and solarization, which differ between views."""
    return Augment(
        flip_p=a.flip_probability,
        jitter_p=a.jitter_probability,
        brightness=a.brightness,
        contrast=a.contrast,
        saturation=a.saturation,
        hue=a.hue_shift if a.hue_space != "off" else 0.0,
        gray_p=a.gray_probability,
    )


def one_view(s: ClipSettings | CocaSettings | SimvlmSettings) -> tuple[ViewSpec, ...]:
    """One crop of nearly the whole image, for methods whose captions describe all of it."""
    augment = Augment(flip_p=s.flip_probability)
    return (
        ViewSpec(
            "image", 1, s.image_size, s.crop_scale, (augment,), normalize=NORMALIZE[s.normalize], interpolation=s.interpolation
        ),
    )
