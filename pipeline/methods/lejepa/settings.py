"""LeJEPA settings."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.types import Count, Positive, Probability
from pipeline.data.augment.settings import MultiCropSettings
from pipeline.methods.settings import register
from pipeline.methods.shared.two_views_settings import TwoViewSettings


@register("lejepa")
class LejepaSettings(TwoViewSettings):
    """LeJEPA (arXiv 2511.08544): prediction between views, with SIGReg and one weight; no teacher, no predictor."""

    name: Literal["lejepa"] = Field(default="lejepa", description="the method")
    views: MultiCropSettings = Field(
        default=MultiCropSettings(local_scale=(0.05, 0.3), global_scale=(0.3, 1.0)), description="multi-crop sizes and counts"
    )
    sigreg_weight: Probability = Field(
        default=0.05, description="weight of SIGReg; that of the prediction is the rest of 1. The paper's only hyper-parameter"
    )
    slices: Count = Field(default=256, description="random directions of a step on which SIGReg projects the features")
    knots: int = Field(default=17, ge=3, le=1001, description="points of SIGReg's integral over the characteristic function, odd")
    integral_limit: Positive = Field(default=5.0, description="the integral runs from minus this to this")
    head_layers: int = Field(default=3, ge=1, le=8, description="number of linear layers of the projector")
    head_hidden: Count = Field(default=2048, description="hidden width of the projector")
    head_out: Count = Field(default=128, description="output dimension of the projector, where views are compared")
    grad_cache: bool = Field(
        default=True,
        description="test the entire global batch for normality even when it is split into micro-batches (GradCache, arXiv "
        "2101.06983), at the cost of a second forward pass; false tests each micro-batch over all ranks. Batch norm sees one "
        "micro-batch in either case",
    )

    @field_validator("knots")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"must be odd, so that 0 is one of the points, not {value}")
        return value

    @model_validator(mode="after")
    def _without_teacher(self) -> Self:
        if self.teacher_norm_statistics != "student":
            raise ValueError("teacher_norm_statistics has no effect: LeJEPA has no teacher; leave it out")
        return self
