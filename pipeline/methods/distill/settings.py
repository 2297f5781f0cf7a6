"""Settings of distillation from a larger frozen teacher."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from pipeline.config.types import PathName, Probability, ShareRange
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.methods.settings import register
from pipeline.models.settings import ModelSettings


class StudentSettings(ModelSettings):
    """The tower of one of several students."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=32, description="what the student is called in terms and exports")


@register("distill")
class DistillSettings(Dinov2Settings):
    """DINOv2's distillation (arXiv 2304.07193, section 5): the same losses, against a frozen tower and its heads."""

    name: Literal["distill"] = Field(default="distill", description="the method")  # type: ignore[assignment]
    teacher_model: ModelSettings = Field(
        default=ModelSettings(), description="the frozen teacher's tower; its heads are as the student's"
    )
    students: tuple[StudentSettings, ...] = Field(
        default=(),
        description="towers that learn beside model from the same pass of the frozen teacher, each with heads and a slow copy of "
        "its own, as if it were trained alone",
    )
    teacher_weights: PathName = Field(
        min_length=1, description="run or checkpoint of fovea whose teacher is frozen here, heads and all"
    )
    mask_probability: Probability = Field(default=1.0, ge=1.0, description="1: the patches of all global crops are compared")
    mask_ratio: ShareRange = Field(default=(1.0, 1.0), description="[1, 1]: all their patches, and none is hidden")

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if len({student.name for student in self.students}) < len(self.students):
            raise ValueError("has two students of one name")
        if self.students and self.gram_weight:
            raise ValueError("has several students, and a Gram anchor is one student's own; set gram_weight to 0")
        return self

    @property
    @override
    def anchors(self) -> dict[str, str | None]:
        """The frozen teacher's source."""
        return {**super().anchors, "judge": self.teacher_weights}
