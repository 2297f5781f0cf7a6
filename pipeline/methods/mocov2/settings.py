"""MoCo v2 settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, Positive
from pipeline.data.augment.settings import AugmentSettings, MultiCropSettings
from pipeline.methods.settings import register
from pipeline.methods.shared.two_views_settings import PAIR, TwoViewSettings


@register("mocov2")
class Mocov2Settings(TwoViewSettings):
    """MoCo v2 (arXiv 2003.04297): contrastive loss with a queue of keys. The paper's teacher momentum is constant, 0.999."""

    name: Literal["mocov2"] = Field(default="mocov2", description="the method")
    views: MultiCropSettings = Field(
        default=PAIR.model_copy(update={"global_scale": (0.2, 1.0)}), description="crop sizes and counts"
    )
    augment: AugmentSettings = Field(
        default=AugmentSettings(saturation=0.4, blur_probability=(0.5,), solarize_probability=(0.0,)),
        description="augmentation of a crop, the same for both views",
    )
    head_norm: Literal["batch", "layer", "none"] = Field(default="none", description="norm in the head; the paper has none")
    temperature: Positive = Field(default=0.2, description="softmax temperature of the contrastive loss")
    queue: Count = Field(default=65536, description="number of earlier keys in the queue, the negatives of each query")
    head_hidden: Count | None = Field(default=None, description="hidden width of the head; null means the backbone's width")
    head_out: Count = Field(default=128, description="output dimension of the head")
