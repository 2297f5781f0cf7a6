"""DINO (v1) settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, Length, Positive, Probability
from pipeline.data.augment.settings import MultiCropSettings
from pipeline.methods.settings import register
from pipeline.methods.shared.two_views_settings import TwoViewSettings


@register("dino")
class DinoSettings(TwoViewSettings):
    """DINO (arXiv 2104.14294): self-distillation of class tokens with multi-crop, centering and sharpening."""

    name: Literal["dino"] = Field(default="dino", description="the method")
    views: MultiCropSettings = Field(
        default=MultiCropSettings(global_scale=(0.4, 1.0), local_size=96, local_scale=(0.05, 0.4)),
        description="multi-crop sizes and counts",
    )
    head_norm: Literal["batch", "none"] = Field(
        default="none", description="norm in the head's hidden layers; batch norm is synchronized over all ranks"
    )
    prototypes: int = Field(default=65536, gt=1, description="output dimension of the projection head")
    head_hidden: Count = Field(default=2048, description="width of the head's hidden layers")
    head_bottleneck: Count = Field(default=256, description="width of the head's bottleneck before the prototypes")
    head_layers: int = Field(default=3, ge=1, le=8, description="number of linear layers of the head before the prototypes")
    freeze_gain: bool = Field(
        default=True, description="fix the norm of the prototypes at 1; false helps small models but can destabilize large ones"
    )
    student_temperature: Positive = Field(default=0.1, description="student softmax temperature")
    center_momentum: Probability = Field(default=0.9, description="EMA momentum of the centre; 1 keeps it at 0")
    prototype_chunk_size: Count | None = Field(
        default=None,
        description="rows of prototype logits in memory at a time; null means as many as fit in 128 MiB, or 256 MiB where "
        "Triton kernels work in place. Does not change results",
    )
    freeze_last_layer: Length = Field(
        default=Length(1, "epochs"), description="time at the start during which the prototype layer's learning rate is 0"
    )
    clip_norm: Positive | None = Field(default=3.0, description="maximum L2 norm of the gradient; null disables clipping")
    clip_scope: Literal["network", "global", "parameter"] = Field(
        default="network",
        description="clip the gradient by the norm of each network, of all parameters together, or of each parameter "
        "(DINO's code)",
    )

    @property
    def last_layer_freeze(self) -> Length:
        """Time for which the prototype layer is frozen."""
        return self.freeze_last_layer
