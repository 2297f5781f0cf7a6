"""Settings of MoCo v2."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, Positive
from pipeline.methods.settings import ViewSettings, register
from pipeline.methods.shared.two_views_settings import PAIR, ColourSettings, TwoViewSettings


@register("mocov2")
class Mocov2Settings(TwoViewSettings):
    """MoCo v2 (arXiv 2003.04297): a queue of earlier keys. The teacher's momentum is constant in the paper, 0.999."""

    name: Literal["mocov2"] = Field(default="mocov2", description="the method")
    views: ViewSettings = Field(
        default=PAIR.model_copy(update={"global_scale": (0.2, 1.0)}), description="the crops of a picture"
    )
    augment: ColourSettings = Field(
        default=ColourSettings(saturation=0.4, blur_probability=(0.5, 0.5), solarize_probability=(0.0, 0.0)),
        description="what happens to a crop; both views alike",
    )
    head_norm: Literal["batch", "layer", "none"] = Field(default="none", description="norm in the head; none in the paper")
    temperature: Positive = Field(default=0.2, description="what cosines are divided by")
    queue: Count = Field(default=65536, description="keys of earlier pictures that each query is compared with")
    head_hidden: Count | None = Field(default=None, description="width of the head's hidden layer; null means the tower's")
    head_out: Count = Field(default=128, description="features that are compared")
