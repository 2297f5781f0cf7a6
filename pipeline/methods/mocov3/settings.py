"""Settings of MoCo v3."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, Positive
from pipeline.methods.settings import register
from pipeline.methods.shared.two_views_settings import TwoViewSettings


@register("mocov3")
class Mocov3Settings(TwoViewSettings):
    """MoCo v3 (arXiv 2104.02057): the keys of the batch instead of a queue, a predictor, transformers."""

    name: Literal["mocov3"] = Field(default="mocov3", description="the method")
    temperature: Positive = Field(default=0.2, description="what cosines are divided by; 1.0 for ResNet-50 in the paper")
    head_hidden: Count = Field(default=4096, description="width of the heads' hidden layers")
    head_out: Count = Field(default=256, description="features that are compared")
    head_layers: int = Field(default=3, ge=1, le=8, description="linear layers of the projector; 2 for ResNet-50 in the paper")
    predictor_norm: bool = Field(default=True, description="a norm after the predictor; not for ResNet-50 in the paper")
    freeze_patches: bool = Field(default=False, description="leave the patch embedding as it is at random (the paper's, for ViT)")
    pos_embed: Literal["learned", "sincos"] = Field(
        default="learned", description="positions of a ViT: learned, or sines and cosines that stand still (the paper's)"
    )
