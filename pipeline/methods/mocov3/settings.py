"""MoCo v3 settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, NonNegative, Positive
from pipeline.methods.settings import register
from pipeline.methods.shared.two_views_settings import TwoViewSettings


@register("mocov3")
class Mocov3Settings(TwoViewSettings):
    """MoCo v3 (arXiv 2104.02057): keys of the batch instead of a queue, a predictor, vision transformers."""

    name: Literal["mocov3"] = Field(default="mocov3", description="the method")
    temperature: Positive = Field(
        default=0.2, description="softmax temperature of the contrastive loss; 1.0 for ResNet-50 in the paper"
    )
    head_hidden: Count = Field(default=4096, description="hidden width of projector and predictor")
    head_out: Count = Field(default=256, description="output dimension of projector and predictor")
    head_layers: int = Field(
        default=3, ge=1, le=8, description="number of linear layers of the projector; 2 for ResNet-50 in the paper"
    )
    predictor_norm: bool = Field(default=True, description="norm after the predictor; off for ResNet-50 in the paper")
    predictor_lr_mult: NonNegative = Field(default=1.0, description="learning-rate multiplier of the predictor")
    freeze_patches: bool = Field(
        default=False, description="freeze the patch embedding at its random initialization (the paper's choice for ViT)"
    )
    pos_embed: Literal["learned", "sincos"] = Field(
        default="learned", description="position embedding of a ViT: learned, or fixed sine-cosine (the paper's)"
    )
