"""SimCLR settings."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.types import Count, Positive
from pipeline.data.augment.settings import AugmentSettings
from pipeline.methods.settings import register
from pipeline.methods.shared.two_views_settings import TwoViewSettings


@register("simclr")
class SimclrSettings(TwoViewSettings):
    """SimCLR (arXiv 2002.05709)."""

    name: Literal["simclr"] = Field(default="simclr", description="the method")
    augment: AugmentSettings = Field(
        default=AugmentSettings(
            brightness=0.8,
            contrast=0.8,
            saturation=0.8,
            hue_shift=0.2,
            blur_probability=(0.5,),
            solarize_probability=(0.0,),
            normalize="none",
        ),
        description="augmentation of a crop, the same for both views",
    )
    temperature: Positive = Field(default=0.1, description="softmax temperature of the contrastive loss")
    head_layers: int = Field(
        default=3, ge=1, le=8, description="number of linear layers of the projector; 2 in the paper, 3 in its code"
    )
    head_hidden: Count | None = Field(default=None, description="hidden width of the projector; null means the backbone's width")
    head_out: Count = Field(default=128, description="output dimension of the projector")
    batch_norm_per_view: bool = Field(
        default=False,
        description="pass each view through the network alone, so that a batch norm sees one view at a time (lightly); false "
        "passes both together (the paper)",
    )
    grad_cache: bool = Field(
        default=True,
        description="contrast each sample with the entire global batch even when it is split into micro-batches "
        "(GradCache, arXiv 2101.06983), at the cost of a second forward pass; false contrasts it with its "
        "micro-batch over all ranks only. Batch norm sees one micro-batch in either case",
    )

    @model_validator(mode="after")
    def _two_views_only(self) -> Self:
        if self.views.local_count:
            raise ValueError("views.local_count must be 0: SimCLR compares two global views and attracts no local ones")
        if self.teacher_norm_statistics != "student":
            raise ValueError("teacher_norm_statistics has no effect: SimCLR has no teacher; leave it out")
        return self
