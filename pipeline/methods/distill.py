"""Settings of distillation from a larger frozen teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from typing_extensions import override

from pipeline.fields import Probability, ShareRange
from pipeline.methods.base import register
from pipeline.methods.dinov2 import Dinov2Settings
from pipeline.sections import ModelSettings


@register("distill")
class DistillSettings(Dinov2Settings):
    """DINOv2's distillation (arXiv 2304.07193, section 5): the same losses, against a frozen tower and its heads."""

    name: Literal["distill"] = Field(default="distill", description="the method")  # type: ignore[assignment]
    judge: ModelSettings = Field(
        default=ModelSettings(), description="the frozen teacher's tower; its heads are as the student's"
    )
    judge_from: str = Field(min_length=1, description="run or checkpoint of fovea whose teacher is frozen here, heads and all")
    mask_probability: Probability = Field(default=1.0, ge=1.0, description="1: the patches of all global crops are compared")
    mask_ratio: ShareRange = Field(default=(1.0, 1.0), description="[1, 1]: all their patches, and none is hidden")

    @property
    @override
    def anchors(self) -> dict[str, str | None]:
        """The frozen teacher's source."""
        return {**super().anchors, "judge": self.judge_from}
