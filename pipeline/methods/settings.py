"""Base settings of all methods: crops, augmentation, gradient clipping, and the registry of settings classes.

To add a method, create a folder here: ``<name>/settings.py`` with a subclass of :class:`MethodSettings` under ``@register``,
and ``<name>/method.py`` with a function ``build``; ``method.name`` then selects both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

from pydantic import Field

from pipeline.config.types import Length, Positive, Probability, Settings, ShareRange


class ViewSettings(Settings):
    """Multi-crop views of an image."""

    global_count: ClassVar[int] = 2  # global crops per sample

    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic",
        description="resize interpolation of crops: bicubic (DINO, DINOv2, BYOL) or bilinear (the code of MoCo)",
    )
    global_size: int = Field(default=224, ge=8, le=4096, description="side of a global crop in pixels")
    global_scale: ShareRange = Field(
        default=(0.32, 1.0), description="smallest and largest fraction of the image's area in a global crop"
    )
    local_count: int = Field(default=8, ge=0, le=64, description="local crops per sample")
    local_size: int = Field(default=98, ge=8, le=4096, description="side of a local crop in pixels")
    local_scale: ShareRange = Field(
        default=(0.05, 0.32), description="smallest and largest fraction of the image's area in a local crop"
    )


class AugmentSettings(Settings):
    """Colour and blur augmentation of a crop."""

    blur: Literal["as_released", "paper", "off"] = Field(
        default="as_released",
        description="blur probabilities of the first global, second global and local crops: as_released (0, 0.9, 0.5) "
        "trained the public weights, paper (1, 0.1, 0.5) follows the text, off is for crops too small to blur",
    )
    hue_space: Literal["hsv", "yiq", "off"] = Field(
        default="hsv", description="hue shift: exact in HSV (hsv), a rotation in YIQ (yiq, faster), or off"
    )
    flip_probability: Probability = Field(default=0.5, description="probability of a horizontal flip")
    jitter_probability: Probability = Field(default=0.8, description="probability of colour jitter")
    brightness: Probability = Field(default=0.4, description="brightness factor is drawn uniformly from 1 ± this")
    contrast: Probability = Field(default=0.4, description="contrast factor is drawn uniformly from 1 ± this")
    saturation: Probability = Field(default=0.2, description="saturation factor is drawn uniformly from 1 ± this")
    hue_shift: float = Field(
        default=0.1, ge=0, le=0.5, description="hue shift is drawn uniformly from ± this, in turns of the colour circle"
    )
    gray_probability: Probability = Field(default=0.2, description="probability of conversion to grayscale")
    solarize_probability: Probability = Field(default=0.2, description="probability of solarizing the second global crop")


class MethodSettings(Settings):
    """Base class of every method's settings; subclasses narrow ``name`` to a literal and are registered."""

    reads_text: ClassVar[bool] = False  # whether the method reads captions

    name: str = Field(description="the method")
    clip_norm: Positive | None = Field(default=None, description="maximum L2 norm of the gradient; null disables clipping")
    clip_scope: Literal["network", "global", "parameter"] = Field(
        default="global",
        description="clip the gradient by the norm of each network, of all parameters together, or of each parameter "
        "(DINO's code)",
    )

    @property
    def last_layer_freeze(self) -> Length:
        """Time for which the parameters that the method marks as its last layer are frozen."""
        return Length(0)

    @property
    def anchors(self) -> dict[str, str | None]:
        """Sources of the weights of the method's frozen networks, by attribute name; None means this run's initial weights."""
        return {}

    @property
    def hue(self) -> Literal["hsv", "yiq", "off"]:
        """Hue shift of the method's views."""
        augment = getattr(self, "augment", None)
        return augment.hue_space if isinstance(augment, AugmentSettings) else "hsv"


R = TypeVar("R", bound=type[MethodSettings])
REGISTERED: dict[str, type[MethodSettings]] = {}


def register(name: str) -> Callable[[R], R]:
    """Class decorator: registers a method's settings as ``method.name: <name>``.

    Raises:
        ValueError: if another class is registered under the name.
    """

    def enter(cls: R) -> R:
        if REGISTERED.setdefault(name, cls) is not cls:
            raise ValueError(f"two methods are called {name!r}")
        return cls

    return enter


class OneViewSettings(MethodSettings):
    """Base settings of methods that see one crop per image, with its caption."""

    image_size: int = Field(default=224, ge=8, le=4096, description="side of the crop in pixels")
    crop_scale: ShareRange = Field(
        default=(0.9, 1.0), description="smallest and largest fraction of the image's area in the crop"
    )
    flip_probability: float = Field(
        default=0.0, ge=0, le=1, description="probability of a horizontal flip; 0 because captions mention left and right"
    )
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic",
        description="resize interpolation: bicubic (CLIP, open_clip) or bilinear (the code of SLIP and DetailCLIP)",
    )
    normalize: Literal["openai", "imagenet", "half"] = Field(
        default="openai", description="mean and standard deviation for normalization; half is 0.5 and 0.5"
    )
