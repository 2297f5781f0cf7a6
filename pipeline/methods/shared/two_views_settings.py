"""Base settings of two-view methods (SimCLR, BYOL, MoCo, DINO): crops, augmentation, heads, LoGo's local repulsion."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.types import NonNegative, Positive, Probability, Settings, Share
from pipeline.methods.settings import MethodSettings, ViewSettings

PAIR = ViewSettings(global_scale=(0.08, 1.0), local_count=0, local_size=96, local_scale=(0.05, 0.4))
"""SimCLR's and BYOL's crops: two of at least 8 % of the image's area, no local ones."""


class ColourSettings(Settings):
    """Colour and blur augmentation; where a setting has two numbers, they are for the first and the second view."""

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
    blur_probability: tuple[Probability, Probability] = Field(
        default=(1.0, 0.1), description="probability of Gaussian blur, with a kernel a tenth of the view's side"
    )
    local_blur_probability: Probability = Field(default=0.5, description="probability of blurring a local crop")
    solarize_probability: tuple[Probability, Probability] = Field(
        default=(0.0, 0.2), description="probability of solarization (inverting bright pixels)"
    )
    normalize: Literal["imagenet", "none"] = Field(
        default="imagenet", description="normalization: ImageNet's mean and standard deviation, or none (SimCLR)"
    )


class RepelSettings(Settings):
    """LoGo's repulsion between local crops of one image, an additional loss of the two-view methods with local crops."""

    weight: NonNegative = Field(default=0.05, description="weight of the repulsion loss")
    hidden: int = Field(
        default=256, ge=1, description="hidden width of LoGo's regressor, which predicts whether two crops are of one image"
    )
    noise: NonNegative = Field(
        default=0.3, description="norm of the noise added to the regressor's training features, relative to the features' norm"
    )


class TwoViewSettings(MethodSettings):
    """Base settings of the methods with two global views."""

    views: ViewSettings = Field(default=PAIR, description="crop sizes and counts")
    augment: ColourSettings = Field(default=ColourSettings(), description="augmentation of a crop")
    local_repulsion: RepelSettings | None = Field(
        default=None,
        description="LoGo's repulsion between local crops, which requires views.local_count of at least 2; null disables it",
    )
    head_norm: Literal["batch", "layer", "none"] = Field(
        default="batch",
        description="norm in the heads; batch norm is synchronized over all ranks, and makes results depend on the "
        "micro-batch size",
    )
    layerwise_lr_decay: Share = Field(
        default=1.0, description="layer-wise learning-rate decay: factor from each block to the one below"
    )
    patch_embed_lr_mult: NonNegative = Field(default=1.0, description="learning-rate multiplier of the patch embedding")
    decay_vectors: bool = Field(
        default=False,
        description="apply weight decay to biases, norms and other vectors too (the code of MoCo v2 with SGD and MoCo v3 "
        "with AdamW)",
    )
    clip_norm: Positive | None = Field(default=None, description="maximum L2 norm of the gradient; null disables clipping")

    @model_validator(mode="before")
    @classmethod
    def _as_the_method_has_it(cls, values: Any) -> Any:
        """Fills partial ``views`` and ``augment`` sections with this method's defaults, not those of the shared class."""
        if not isinstance(values, dict):
            return values
        found = dict(values)
        for name in ("views", "augment"):
            if isinstance(values.get(name), dict):
                given = {key: tuple(value) if isinstance(value, list) else value for key, value in values[name].items()}
                found[name] = cls.model_fields[name].default.model_dump() | given
        return found

    @property
    def hue(self) -> Literal["hsv", "yiq", "off"]:
        """Hue shift of the method's views."""
        return self.augment.hue_space

    @model_validator(mode="after")
    def _something_to_repel(self) -> Self:
        if self.local_repulsion is not None and self.views.local_count < 2:
            raise ValueError(f"local_repulsion needs views.local_count of 2 or more, not {self.views.local_count}")
        return self
