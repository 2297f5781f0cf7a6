"""Base settings of two-view methods (SimCLR, BYOL, MoCo, DINO): crops, augmentation, heads, LoGo's local repulsion."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.types import NonNegative, Positive, Settings, Share
from pipeline.data.augment.settings import AugmentSettings, MultiCropSettings
from pipeline.methods.settings import MethodSettings

PAIR = MultiCropSettings(global_scale=(0.08, 1.0), local_count=0, local_size=96, local_scale=(0.05, 0.4))
"""SimCLR's and BYOL's crops: two of at least 8 % of the image's area, no local ones."""
COLOURS = AugmentSettings(blur_probability=(1.0, 0.1))
"""BYOL's augmentation, from which the other methods with two views differ a little."""


class RepelSettings(Settings):
    """LoGo's repulsion between local crops of one image, an additional loss of the two-view methods with local crops."""

    weight: NonNegative = Field(default=0.05, description="weight of the repulsion loss")
    hidden: int = Field(
        default=256, ge=1, description="hidden width of LoGo's regressor, which predicts whether two crops are of one image"
    )
    noise: NonNegative = Field(
        default=0.3, description="norm of the noise added to the regressor's training features, relative to the features' norm"
    )


class TwoViewSettings(MethodSettings):
    """Base settings of the methods with two global views."""

    resizable: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    guidable: ClassVar[bool] = True

    views: MultiCropSettings = Field(default=PAIR, description="crop sizes and counts")
    augment: AugmentSettings = Field(default=COLOURS, description="augmentation of a crop")
    local_repulsion: RepelSettings | None = Field(
        default=None,
        description="LoGo's repulsion between local crops, which requires views.local_count of at least 2; null disables it",
    )
    head_norm: Literal["batch", "layer", "none"] = Field(
        default="batch",
        description="norm in the heads; batch norm is synchronized over all ranks, and makes results depend on the "
        "micro-batch size",
    )
    teacher_norm_statistics: Literal["student", "own"] = Field(
        default="student",
        description="running statistics of the teacher's batch norms, which matter only where the teacher is evaluated or "
        "exported: a copy of the student's, or its own from its training batches (the code of DINO and of lightly)",
    )
    layerwise_lr_decay: Share = Field(
        default=1.0, description="layer-wise learning-rate decay: factor from each block to the one below"
    )
    patch_embed_lr_mult: NonNegative = Field(default=1.0, description="learning-rate multiplier of the patch embedding")
    decay_vectors: bool = Field(
        default=False,
        description="apply weight decay to biases, norms and other vectors too (the code of MoCo v2 with SGD and MoCo v3 "
        "with AdamW)",
    )
    clip_norm: Positive | None = Field(default=None, description="maximum L2 norm of the gradient; null disables clipping")

    @model_validator(mode="after")
    def _something_to_repel(self) -> Self:
        if self.local_repulsion is not None and self.views.local_count < 2:
            raise ValueError(f"local_repulsion needs views.local_count of 2 or more, not {self.views.local_count}")
        return self
