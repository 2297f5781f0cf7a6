"""Settings of DINO, the first."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, Length, Positive, Probability
from pipeline.methods.settings import ViewSettings, register
from pipeline.methods.shared.two_views_settings import ColourSettings, TwoViewSettings


@register("dino")
class DinoSettings(TwoViewSettings):
    """DINO (arXiv 2104.14294): class tokens over prototypes, multi-crop, centring and sharpening."""

    name: Literal["dino"] = Field(default="dino", description="the method")
    views: ViewSettings = Field(
        default=ViewSettings(global_scale=(0.4, 1.0), local_size=96, local_scale=(0.05, 0.4)),
        description="the crops of a picture",
    )
    augment: ColourSettings = Field(default=ColourSettings(), description="what happens to a crop")
    head_norm: Literal["batch", "none"] = Field(
        default="none", description="norm in the head's hidden layers; batch is over all ranks, see the other methods"
    )
    prototypes: int = Field(default=65536, gt=1, description="outputs of the projection head")
    head_hidden: Count = Field(default=2048, description="width of the head's hidden layers")
    head_bottleneck: Count = Field(default=256, description="width before the prototypes")
    head_layers: int = Field(default=3, ge=1, le=8, description="linear layers of the head before the prototypes")
    freeze_gain: bool = Field(
        default=True, description="prototypes keep the length 1; false helps small towers and unsteadies large ones"
    )
    student_temperature: Positive = Field(default=0.1, description="temperature of the student's softmax")
    center_momentum: Probability = Field(default=0.9, description="share of the old centre kept each step; 1 leaves it at 0")
    prototype_chunk_size: Count | None = Field(
        default=None,
        description="rows of prototype logits that are in memory at once; null means as many as fill 128 MiB, or 256 MiB where "
        "Triton works on them in place. Changes no result",
    )
    freeze_last_layer: Length = Field(
        default=Length(1, "epochs"), description="how long the prototype layer's learning rate is 0"
    )
    clip_norm: Positive | None = Field(default=3.0, description="largest L2 norm of the gradient; null means no clipping")
    clip_scope: Literal["network", "global", "parameter"] = Field(
        default="network",
        description="clip each network by its own norm, all together, or each parameter by its own (DINO's code)",
    )

    @property
    def last_layer_freeze(self) -> Length:
        """How long the prototypes stand still."""
        return self.freeze_last_layer
