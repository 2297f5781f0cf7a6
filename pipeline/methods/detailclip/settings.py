"""DetailCLIP settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, NonNegative, Positive, Probability, Share
from pipeline.data.augment.settings import AugmentSettings, ViewSettings
from pipeline.methods.clip.settings import ContrastiveSettings
from pipeline.methods.settings import register


@register("detailclip")
class DetailClipSettings(ContrastiveSettings):
    """DetailCLIP (arXiv 2409.06809): CLIP plus masked self-distillation from an EMA teacher and pixel reconstruction."""

    name: Literal["detailclip"] = Field(default="detailclip", description="the method")
    views: ViewSettings = Field(default=ViewSettings(global_scale=(0.14, 1.0)), description="size and scale of the two views")
    augment: AugmentSettings = Field(
        default=AugmentSettings(flip_probability=0.0, blur_probability=(0.1,), solarize_probability=(0.2,)),
        description="augmentation of the two views",
    )
    init_logit_scale: Positive = Field(default=1 / 0.07, description="initial inverse temperature of the image-text loss")
    keep_ratio: float = Field(default=0.5, gt=0, lt=1, description="fraction of a view's mask units that the student sees")
    keep_count: Literal["plus_one", "round"] = Field(
        default="plus_one",
        description="rounding of the number of visible mask units: floor plus one (as released), or nearest",
    )
    mask_unit: Literal["cells", "patch"] = Field(
        default="cells", description="unit of masking: cells of 2 x 2 patches, or single patches"
    )
    aggregation: Literal["all", "last"] = Field(
        default="all",
        description="attention of the teacher's class token that selects the visible patches: mean over all layers and "
        "heads, or over the last layer's heads",
    )
    cls_pairing: Literal["cross", "same", "both"] = Field(
        default="cross", description="class-token targets: the teacher's class token of the other view, the same view, or both"
    )
    patch_positions: Literal["removed", "all"] = Field(
        default="removed", description="patches in the patch loss: only the masked ones, or all"
    )
    center_over: Literal["all", "removed"] = Field(
        default="all", description="teacher patches whose mean updates the centre: all, or only the masked ones"
    )
    teacher_size: int | None = Field(
        default=None,
        ge=2,
        description="side in pixels to which the teacher's views are downscaled, a multiple of the patch size; null for "
        "no downscaling (as released). The teacher's features are resampled to the student's grid; 160 of 224 "
        "halves the teacher's cost",
    )
    freeze_patch_embed: bool = Field(default=True, description="keep the patch embedding at its initial weights")
    text_teacher: bool = Field(
        default=True,
        description="keep an EMA teacher of the text tower too; then evaluation and export use the teacher towers (as released)",
    )
    prototypes: int = Field(default=8192, gt=1, description="output dimension of the projection head")
    head_hidden: Count = Field(default=2048, description="width of the head's hidden layers")
    head_bottleneck: Count = Field(default=256, description="width of the head's bottleneck before the prototypes")
    head_layers: int = Field(default=3, ge=1, le=8, description="number of linear layers of the head before the prototypes")
    student_temperature: Positive = Field(default=0.1, description="student softmax temperature")
    cls_temperature: Positive = Field(
        default=0.04,
        description="teacher temperature of the class-token targets; schedule.teacher_temperature sets that of the patches",
    )
    center_momentum: Probability = Field(default=0.9, description="EMA momentum of the centres")
    decoder_depth: int = Field(default=1, ge=1, le=32, description="number of transformer blocks of the decoder")
    decoder_heads: Count = Field(default=16, description="attention heads of the decoder, which is as wide as the vision tower")
    norm_pix_loss: bool = Field(
        default=True, description="normalize each patch's target pixels by the patch's own mean and standard deviation"
    )
    clip_weight: NonNegative = Field(default=1.0, description="weight of the image-text loss")
    cls_weight: NonNegative = Field(default=1.0, description="weight of the class-token loss")
    patch_weight: NonNegative = Field(default=1.0, description="weight of the patch loss")
    reconstruction_weight: NonNegative = Field(default=1.0, description="weight of the reconstruction loss on masked patches")
    no_weight_decay: tuple[Literal["positions", "class_token", "token_embedding"], ...] = Field(
        default=(), description="parameters without weight decay; biases, norms, logit scale and other vectors are never decayed"
    )
    layerwise_lr_decay: Share = Field(
        default=1.0, description="layer-wise learning-rate decay of the vision tower: factor from each block to the one below"
    )
    prototype_chunk_size: Count | None = Field(
        default=None,
        description="rows of prototype logits in memory at a time; null means as many as fit in 128 MiB, or 256 MiB where "
        "Triton kernels work in place. Does not change results",
    )
