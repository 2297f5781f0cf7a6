"""Settings of a new run's initial weights, and of how a network that begins with pretrained weights is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, Length, NonNegative, PathName, Positive, Settings


class InitSettings(Settings):
    """Initial weights of a new run, if not random. A run that resumes ignores them."""

    source: PathName | None = Field(
        default=None,
        min_length=1,
        description="fovea run or checkpoint, weights file or folder in the layout of DINOv2, DINOv3, timm, open_clip or Hugging "
        "Face, or timm:NAME; null for random weights",
    )
    network: Literal["teacher", "student"] = Field(default="teacher", description="network to take from a fovea checkpoint")
    input_channels: Literal["mean", "repeat"] | tuple[Literal["red", "green", "blue", "mean", "zero"], ...] = Field(
        default="mean",
        description="how the first layer of weights for RGB images is extended to data.channels: every channel begins with the "
        "mean of the three colours (mean) or with one of them in turn (repeat), both times 3 / channels; or a list with the "
        "colour of each channel, red, green, blue, mean or zero",
    )
    heads: bool = Field(default=False, description="load the heads of a fovea checkpoint too, not only the backbone")


class LoraSettings(Settings):
    """Low-rank adapters (LoRA, arXiv 2106.09685)."""

    rank: Count = Field(default=8, description="rank of a projection's difference from the start")
    alpha: Positive = Field(default=16.0, description="scale of the difference: it is multiplied by alpha / rank")
    projections: tuple[Literal["attention", "mlp"], ...] = Field(
        default=("attention", "mlp"), min_length=1, description="projections of a block that have adapters"
    )
    train_down: bool = Field(
        default=True,
        description="train both factors; false trains the second one only (LoRA-FA, arXiv 2308.03303), and the teacher then is "
        "exactly the moving average of the merged student",
    )


class AdaptSettings(Settings):
    """How a vision tower with pretrained weights (``init_from.source``) is trained on."""

    train: Literal["all", "last_blocks", "lora"] = Field(
        default="all",
        description="what of the tower is trained: all of it; its last blocks, final norm and mask token; or low-rank adapters "
        "and the mask token. The rest is stored once, not in each checkpoint",
    )
    last_blocks: Count = Field(default=4, description="number of blocks that train=last_blocks trains")
    lora: LoraSettings = Field(default=LoraSettings(), description="the adapters of train=lora")
    freeze_backbone: Length = Field(
        default=Length(0),
        description="time at the start during which only the heads are trained, which are new; the tower's learning rate then "
        "rises from 0 to its schedule over another schedule.lr.warmup",
    )
    backbone_lr_mult: Positive = Field(
        default=1.0, description="learning-rate multiplier of the vision tower, besides layerwise_lr_decay"
    )
    preserve_cls: NonNegative = Field(
        default=0.0,
        description="weight of the distance between the class tokens of the student and of the frozen start (1 - cosine), on the "
        "first global view; costs a forward pass of both",
    )
    preserve_patches: NonNegative = Field(
        default=0.0,
        description="weight of the distance between the similarities of patches in the student and in the frozen start (the loss "
        "of Gram anchoring, arXiv 2508.10104), on the first global view",
    )
    l2_to_start: NonNegative = Field(
        default=0.0,
        description="decay of the tower's weights towards those it began with (L2-SP, arXiv 1802.01483), decoupled from the "
        "gradient as in AdamW: each step moves them by the learning rate times this towards the start",
    )

    @property
    def keeps_start(self) -> bool:
        """Whether the run keeps a frozen copy of the tower as it began."""
        return self.preserve_cls > 0 or self.preserve_patches > 0 or self.l2_to_start > 0
