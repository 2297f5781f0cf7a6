"""Settings of BYOL."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count
from pipeline.methods.settings import register
from pipeline.methods.shared.two_views_settings import TwoViewSettings


@register("byol")
class ByolSettings(TwoViewSettings):
    """BYOL (arXiv 2006.07733)."""

    name: Literal["byol"] = Field(default="byol", description="the method")
    head_hidden: Count = Field(default=4096, description="width of the hidden layer of projector and predictor")
    head_out: Count = Field(default=256, description="features that are predicted")
    predictor: bool = Field(default=True, description="predict the teacher's features; without, features collapse: to be seen")
