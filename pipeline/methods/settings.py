"""What the settings of all methods share: crops, colours, clipping, and the register they are entered in.

A new method is a folder here: ``<name>/settings.py`` with a subclass of :class:`MethodSettings` under ``@register``, and
``<name>/method.py`` with a function ``build``; ``method.name`` then selects both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

from pydantic import Field

from pipeline.config.types import Length, Positive, Probability, Settings, ShareRange


class ViewSettings(Settings):
    """The crops of a picture."""

    global_count: ClassVar[int] = 2  # global crops of a sample

    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic", description="how crops are resized: bicubic (DINO, DINOv2, BYOL), or bilinear (the code of MoCo)"
    )
    global_size: int = Field(default=224, ge=8, le=4096, description="side of a global crop, pixels")
    global_scale: ShareRange = Field(
        default=(0.32, 1.0), description="least and largest share of the picture's area in a global crop"
    )
    local_count: int = Field(default=8, ge=0, le=64, description="local crops of a sample")
    local_size: int = Field(default=98, ge=8, le=4096, description="side of a local crop, pixels")
    local_scale: ShareRange = Field(
        default=(0.05, 0.32), description="least and largest share of the picture's area in a local crop"
    )


class AugmentSettings(Settings):
    """What happens to a crop's colours and sharpness."""

    blur: Literal["as_released", "paper", "off"] = Field(
        default="as_released",
        description="probabilities of blur for global 1, global 2, local: as_released (0, 0.9, 0.5) trained the public weights, "
        "paper (1, 0.1, 0.5) is what the text says, off is for crops too small to blur",
    )
    hue_space: Literal["hsv", "yiq", "off"] = Field(
        default="hsv", description="how the hue is shifted: exact (hsv), as a rotation (yiq, faster), not at all"
    )
    flip_probability: Probability = Field(default=0.5, description="probability of a horizontal flip")
    jitter_probability: Probability = Field(default=0.8, description="probability of any colour jitter")
    brightness: Probability = Field(default=0.4, description="brightness factor is uniform in 1 ± this")
    contrast: Probability = Field(default=0.4, description="contrast factor is uniform in 1 ± this")
    saturation: Probability = Field(default=0.2, description="saturation factor is uniform in 1 ± this")
    hue_shift: float = Field(
        default=0.1, ge=0, le=0.5, description="hue shift is uniform in ± this, in turns of the colour circle"
    )
    gray_probability: Probability = Field(default=0.2, description="probability of grayscale")
    solarize_probability: Probability = Field(default=0.2, description="probability of solarizing the second global crop")


class MethodSettings(Settings):
    """Base of every method's settings; subclasses narrow ``name`` to a literal and are registered."""

    reads_text: ClassVar[bool] = False  # whether the method wants captions

    name: str = Field(description="the method")
    clip_norm: Positive | None = Field(default=None, description="largest L2 norm of the gradient; null means no clipping")
    clip_scope: Literal["network", "global", "parameter"] = Field(
        default="global",
        description="clip each network by its own norm, all together, or each parameter by its own (DINO's code)",
    )

    @property
    def last_layer_freeze(self) -> Length:
        """How long the parameters that a method marks as its last layer stand still."""
        return Length(0)

    @property
    def anchors(self) -> dict[str, str | None]:
        """Frozen networks of the method, by its attribute, and where their weights come from; None means those of the start."""
        return {}

    @property
    def hue(self) -> Literal["hsv", "yiq", "off"]:
        """How the hue of its views is shifted."""
        augment = getattr(self, "augment", None)
        return augment.hue_space if isinstance(augment, AugmentSettings) else "hsv"


R = TypeVar("R", bound=type[MethodSettings])
REGISTERED: dict[str, type[MethodSettings]] = {}


def register(name: str) -> Callable[[R], R]:
    """Class decorator: makes a method's settings known as ``method.name: <name>``.

    Raises:
        ValueError: if another class holds the name.
    """

    def enter(cls: R) -> R:
        if REGISTERED.setdefault(name, cls) is not cls:
            raise ValueError(f"two methods are called {name!r}")
        return cls

    return enter


class OneViewSettings(MethodSettings):
    """Base of the methods that see each picture once, as one crop, and read its caption."""

    image_size: int = Field(default=224, ge=8, le=4096, description="side of the picture, pixels")
    crop_scale: ShareRange = Field(default=(0.9, 1.0), description="least and largest share of the picture's area in the crop")
    flip_probability: float = Field(
        default=0.0, ge=0, le=1, description="probability of a horizontal flip; captions say left and right"
    )
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic",
        description="how the crop is resized: bicubic (CLIP, open_clip), or bilinear (the code of SLIP, DetailCLIP)",
    )
    normalize: Literal["openai", "imagenet", "half"] = Field(
        default="openai", description="mean and deviation taken off the colours; half is 0.5 and 0.5"
    )
