"""Settings of crops and augmentation (sections ``method.views`` and ``method.augment``), the same for every method."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.config.types import ImageSize, Length, NonNegative, Probability, Settings, ShareRange


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _shortest(values: tuple[float, ...]) -> tuple[float, ...]:
    return values[:1] if len(set(values)) == 1 else values


PerView = Annotated[
    tuple[Probability, ...], Field(min_length=1, max_length=2), BeforeValidator(_one_or_more), AfterValidator(_shortest)
]
"""One probability for all global views, or one for the first and one for the second; two equal ones become one."""


GLOBAL_VIEWS = 2
"""Global views of an image in methods that compare views."""


class CurriculumStage(Settings):
    """Sizes of views in a stretch of the run, before the full ones."""

    until: Length = Field(description="where the stage ends, counted from the start of the run, such as 30 epochs")
    global_size: ImageSize | None = Field(
        default=None,
        description="side of a global crop in pixels, or [height, width] with the aspect ratio of views.global_size; null means "
        "views.global_size",
    )
    patch_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="fraction of the patches of each global view that the student does not see, drawn by sample and epoch; for "
        "vision transformers. The teacher sees all patches",
    )


class MultiCropStage(CurriculumStage):
    """Sizes of global and local views in a stretch of the run."""

    local_size: ImageSize | None = Field(
        default=None,
        description="side of a local crop in pixels, or [height, width] with the aspect ratio of views.local_size; null means "
        "views.local_size",
    )


class ViewSettings(Settings):
    """Global views of an image: random crops, resized to one size."""

    global_size: ImageSize = Field(
        default=224, description="side of a global crop in pixels, or [height, width]; its aspect ratio is that of the crops"
    )
    global_scale: ShareRange = Field(
        default=(0.32, 1.0), description="smallest and largest fraction of the image's area in a global crop"
    )
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic",
        description="resize interpolation of crops: bicubic (CLIP, DINO, DINOv2, BYOL) or bilinear (the code of MoCo, SLIP and "
        "DetailCLIP)",
    )
    curriculum: tuple[CurriculumStage, ...] = Field(
        default=(),
        description="sizes of views at the beginning of the run, stage by stage; after the last stage, and in evaluations and "
        "exports, they have the sizes above. The crops are the same, only resized to other sizes",
    )

    def at(self, stage: CurriculumStage) -> Self:
        """These settings with the sizes of a stage, and no stages."""
        sizes = {name: size for name in ("global_size", "local_size") if (size := getattr(stage, name, None)) is not None}
        return self.model_copy(update={**sizes, "curriculum": ()})


class MultiCropSettings(ViewSettings):
    """Two global views and several small local ones."""

    local_count: int = Field(default=8, ge=0, le=64, description="local crops per sample")
    local_size: ImageSize = Field(default=98, description="side of a local crop in pixels, or [height, width]")
    local_scale: ShareRange = Field(
        default=(0.05, 0.32), description="smallest and largest fraction of the image's area in a local crop"
    )
    curriculum: tuple[MultiCropStage, ...] = Field(default=(), description=ViewSettings.model_fields["curriculum"].description)


class AugmentSettings(Settings):
    """Augmentation of a crop, in this order: flip, colour jitter, grayscale, blur, solarization, normalization; then, for images
    of declared channels (``data.channels``), gain and offset, noise, channel dropout.
    """

    flip_probability: Probability = Field(default=0.5, description="probability of a horizontal flip")
    jitter_probability: Probability = Field(default=0.8, description="probability of colour jitter")
    brightness: Probability = Field(default=0.4, description="brightness factor is drawn uniformly from 1 ± this")
    contrast: Probability = Field(default=0.4, description="contrast factor is drawn uniformly from 1 ± this")
    saturation: Probability = Field(default=0.2, description="saturation factor is drawn uniformly from 1 ± this")
    hue_space: Literal["hsv", "yiq", "off"] = Field(
        default="hsv", description="hue shift: exact in HSV (hsv), a rotation in YIQ (yiq, faster), or off"
    )
    hue_shift: float = Field(
        default=0.1, ge=0, le=0.5, description="hue shift is drawn uniformly from ± this, in turns of the colour circle"
    )
    gray_probability: Probability = Field(default=0.2, description="probability of conversion to grayscale")
    blur_probability: PerView = Field(
        default=(0.0, 0.9), description="probability of Gaussian blur: one for all global views, or one for each of the two"
    )
    local_blur_probability: Probability = Field(default=0.5, description="probability of Gaussian blur of a local crop")
    solarize_probability: PerView = Field(
        default=(0.0, 0.2),
        description="probability of solarization (inverting bright pixels): one for all global views, or one for each of the two",
    )
    gain: Probability = Field(
        default=0.0, description="with data.channels: a factor of each channel's normalized values, drawn uniformly from 1 ± this"
    )
    offset: NonNegative = Field(
        default=0.0,
        description="with data.channels: a shift of each channel, drawn uniformly from ± this, in standard deviations",
    )
    noise: NonNegative = Field(
        default=0.0,
        description="with data.channels: Gaussian noise, whose standard deviation is drawn uniformly from 0 to this, in standard "
        "deviations of a channel",
    )
    channel_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="with data.channels: probability that a channel is replaced by its mean; one always stays",
    )
    normalize: Literal["imagenet", "openai", "half", "none"] = Field(
        default="imagenet",
        description="mean and standard deviation for normalization: ImageNet's, OpenAI's (CLIP), 0.5 and 0.5, or none (0 and 1); "
        "with data.channels, its own mean and std are used instead",
    )
