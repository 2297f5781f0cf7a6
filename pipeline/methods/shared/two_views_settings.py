"""What the settings share of methods that compare two views of a picture: crops, colours of either view, heads, repulsion."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.types import NonNegative, Positive, Probability, Settings, Share
from pipeline.methods.settings import MethodSettings, ViewSettings

PAIR = ViewSettings(global_scale=(0.08, 1.0), local_count=0, local_size=96, local_scale=(0.05, 0.4))
"""Two crops of any size above a twelfth of the picture and no local ones: SimCLR's and BYOL's."""


class ColourSettings(Settings):
    """What happens to the crops' colours and sharpness; where there are two numbers, to the first and to the second view."""

    flip_probability: Probability = Field(default=0.5, description="probability of a horizontal flip")
    jitter_probability: Probability = Field(default=0.8, description="probability of any colour jitter")
    brightness: Probability = Field(default=0.4, description="brightness factor is uniform in 1 ± this")
    contrast: Probability = Field(default=0.4, description="contrast factor is uniform in 1 ± this")
    saturation: Probability = Field(default=0.2, description="saturation factor is uniform in 1 ± this")
    hue_space: Literal["hsv", "yiq", "off"] = Field(
        default="hsv", description="how the hue is shifted: exact (hsv), as a rotation (yiq, faster), not at all"
    )
    hue_shift: float = Field(
        default=0.1, ge=0, le=0.5, description="hue shift is uniform in ± this, in turns of the colour circle"
    )
    gray_probability: Probability = Field(default=0.2, description="probability of grayscale")
    blur_probability: tuple[Probability, Probability] = Field(
        default=(1.0, 0.1), description="probability of blur, its window a tenth of the view"
    )
    local_blur_probability: Probability = Field(default=0.5, description="probability of blur of a local crop")
    solarize_probability: tuple[Probability, Probability] = Field(
        default=(0.0, 0.2), description="probability of inverting bright colours"
    )
    normalize: Literal["imagenet", "none"] = Field(
        default="imagenet", description="what is taken off the colours: ImageNet's mean and deviation, or nothing (SimCLR)"
    )


class RepelSettings(Settings):
    """LoGo's repulsion of the local crops of one picture, as a further term of any method here that attracts local crops."""

    weight: NonNegative = Field(default=0.05, description="weight of the repelling term")
    hidden: int = Field(default=256, ge=1, description="width of the judge's hidden layers")
    noise: NonNegative = Field(
        default=0.3, description="length of the noise on the features that the judge learns from, relative to theirs"
    )


class TwoViewSettings(MethodSettings):
    """Base of the methods of two views."""

    views: ViewSettings = Field(default=PAIR, description="the crops of a picture")
    augment: ColourSettings = Field(default=ColourSettings(), description="what happens to a crop")
    local_repulsion: RepelSettings | None = Field(
        default=None, description="LoGo's repulsion of local crops, for which views.local_count is 2 or more; null for none"
    )
    head_norm: Literal["batch", "layer", "none"] = Field(
        default="batch",
        description="norm in the heads; batch is over all ranks, and with it micro-batches are never one large batch",
    )
    layerwise_lr_decay: Share = Field(default=1.0, description="learning-rate factor from one block to the block below")
    patch_embed_lr_mult: NonNegative = Field(default=1.0, description="learning-rate factor of the patch embedding")
    decay_vectors: bool = Field(
        default=False,
        description="weight decay on biases, norms and other vectors too (the code of MoCo v2 and v3 with SGD, AdamW)",
    )
    clip_norm: Positive | None = Field(default=None, description="largest L2 norm of the gradient; null means no clipping")

    @model_validator(mode="before")
    @classmethod
    def _as_the_method_has_it(cls, values: Any) -> Any:
        """What a section leaves out is this method's default, not that of another that shares the section."""
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
        """How the hue of its views is shifted."""
        return self.augment.hue_space

    @model_validator(mode="after")
    def _something_to_repel(self) -> Self:
        if self.local_repulsion is not None and self.views.local_count < 2:
            raise ValueError(f"repel wants views.local_count of 2 or more, not {self.views.local_count}")
        return self
