"""Settings of a new run's initial weights, and of how a network that begins with pretrained weights is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Length, PathName, Positive, Settings


class InitSettings(Settings):
    """Initial weights of a new run, if not random. A run that resumes ignores them."""

    source: PathName | None = Field(
        default=None,
        min_length=1,
        description="fovea run or checkpoint, weights file or folder in the layout of DINOv2, DINOv3, timm, open_clip or Hugging "
        "Face, or timm:NAME; null for random weights",
    )
    network: Literal["teacher", "student"] = Field(default="teacher", description="network to take from a fovea checkpoint")
    heads: bool = Field(default=False, description="load the heads of a fovea checkpoint too, not only the backbone")


class AdaptSettings(Settings):
    """How a vision tower with pretrained weights (``init_from.source``) is trained on."""

    freeze_backbone: Length = Field(
        default=Length(0),
        description="time at the start during which only the heads are trained, which are new; the tower's learning rate then "
        "rises from 0 to its schedule over another schedule.lr.warmup",
    )
    backbone_lr_mult: Positive = Field(
        default=1.0, description="learning-rate multiplier of the vision tower, besides layerwise_lr_decay"
    )
