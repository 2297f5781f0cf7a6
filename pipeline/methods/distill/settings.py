"""Settings of distillation from a larger frozen teacher."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from pipeline.config.types import PathName, Probability, ShareRange
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.methods.settings import register
from pipeline.models.settings import ModelSettings


class StudentSettings(ModelSettings):
    """Backbone of one of several students."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=32, description="name of the student in metrics and exports")


@register("distill")
class DistillSettings(Dinov2Settings):
    """DINOv2's distillation (arXiv 2304.07193, section 5): DINOv2's losses against a frozen teacher with its heads."""

    guidable: ClassVar[bool] = False  # its target is the frozen teacher's
    name: Literal["distill"] = Field(default="distill", description="the method")  # type: ignore[assignment]
    teacher_model: ModelSettings = Field(
        default=ModelSettings(), description="backbone of the frozen teacher; its heads have the student's sizes"
    )
    students: tuple[StudentSettings, ...] = Field(
        default=(),
        description="further student backbones that train beside model on the same teacher forward pass; each has its own "
        "heads and EMA teacher, as if trained alone",
    )
    teacher_weights: PathName = Field(
        min_length=1, description="fovea run or checkpoint whose teacher, heads included, is the frozen teacher"
    )
    mask_probability: Probability = Field(default=1.0, ge=1.0, description="must be 1: the patch loss covers all global crops")
    mask_ratio: ShareRange = Field(
        default=(1.0, 1.0), description="must be [1, 1]: the patch loss covers all patches, and none is hidden"
    )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if len({student.name for student in self.students}) < len(self.students):
            raise ValueError("has two students of one name")
        if self.students and self.gram_weight:
            raise ValueError("has several students, and a Gram anchor is one student's own; set gram_weight to 0")
        if self.students and self.target_batch != "global":
            raise ValueError("has several students, whose targets are computed once for all; set target_batch to global")
        return self

    @property
    @override
    def anchors(self) -> dict[str, str | None]:
        """Source of the frozen teacher's weights."""
        return {**super().anchors, "judge": self.teacher_weights}
