"""BYOL settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, NonNegative
from pipeline.methods.settings import register
from pipeline.methods.shared.two_views_settings import TwoViewSettings


@register("byol")
class ByolSettings(TwoViewSettings):
    """BYOL (arXiv 2006.07733)."""

    name: Literal["byol"] = Field(default="byol", description="the method")
    head_hidden: Count = Field(default=4096, description="hidden width of the projector and the predictor")
    head_out: Count = Field(default=256, description="output dimension of the projector and the predictor")
    predictor_lr_mult: NonNegative = Field(default=1.0, description="learning-rate multiplier of the predictor")
    predictor: bool = Field(default=True, description="use the predictor; false makes the features collapse (for demonstrations)")
