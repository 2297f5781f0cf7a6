"""Settings of DetailCLIP."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, NonNegative, Positive, Probability, Share, ShareRange
from pipeline.methods.clip.settings import ContrastiveSettings
from pipeline.methods.settings import AugmentSettings, register


class DetailAugmentSettings(AugmentSettings):
    """What happens to each of the two views; both are treated alike."""

    flip_probability: Probability = Field(default=0.0, description="probability of a horizontal flip")
    blur_probability: Probability = Field(default=0.1, description="probability of a blur, unless blur is off")
    blur: Literal["as_released", "off"] = Field(
        default="as_released", description="whether views are blurred at all; off is for views too small to blur"
    )
    solarize_probability: Probability = Field(default=0.2, description="probability of solarizing a view")


@register("detailclip")
class DetailClipSettings(ContrastiveSettings):
    """DetailCLIP (arXiv 2409.06809): CLIP whose student sees half of each view, and learns the other half from a slow teacher."""

    name: Literal["detailclip"] = Field(default="detailclip", description="the method")
    image_size: int = Field(default=224, ge=8, le=4096, description="side of a view, pixels")
    crop_scale: ShareRange = Field(default=(0.14, 1.0), description="least and largest share of the picture's area in a view")
    augment: DetailAugmentSettings = Field(default=DetailAugmentSettings(), description="what happens to a view")
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic",
        description="how the crop is resized: bicubic (CLIP, open_clip), or bilinear (the code of SLIP, DetailCLIP)",
    )
    normalize: Literal["openai", "imagenet", "half"] = Field(
        default="imagenet", description="mean and deviation taken off the colours; half is 0.5 and 0.5"
    )
    init_logit_scale: Positive = Field(default=1 / 0.07, description="initial inverse temperature of the image-text loss")
    keep_ratio: float = Field(default=0.5, gt=0, lt=1, description="share of a view's cells that the student sees")
    keep_count: Literal["plus_one", "round"] = Field(
        default="plus_one",
        description="cells kept: one more than the whole part of the share (as released), or the nearest number",
    )
    mask_unit: Literal["cells", "patch"] = Field(
        default="cells", description="what is kept or removed: 2 x 2 patches, or single ones"
    )
    aggregation: Literal["all", "last"] = Field(
        default="all",
        description="attention of the teacher's class token: mean over all layers and heads, or over the last layer's heads",
    )
    cls_pairing: Literal["cross", "same", "both"] = Field(
        default="cross", description="class tokens predict the teacher's of the other view, of the same one, or of both"
    )
    patch_positions: Literal["removed", "all"] = Field(default="removed", description="patches that predict the teacher's")
    center_over: Literal["all", "removed"] = Field(
        default="all", description="the teacher's patches whose mean the centre follows"
    )
    teacher_size: int | None = Field(
        default=None,
        ge=2,
        description="side to which views are shrunk for the teacher, pixels: a multiple of the patch, null for none (as "
        "released). Its features are resampled to the student's grid; at 160 of 224 it costs half",
    )
    freeze_patch_embed: bool = Field(default=True, description="the patch embedding keeps its initial weights")
    text_teacher: bool = Field(
        default=True, description="the text tower has a slow copy too, and the slow towers are judged and exported (as released)"
    )
    prototypes: int = Field(default=8192, gt=1, description="outputs of the projection head")
    head_hidden: Count = Field(default=2048, description="width of the head's hidden layers")
    head_bottleneck: Count = Field(default=256, description="width before the prototypes")
    head_layers: int = Field(default=3, ge=1, le=8, description="linear layers of the head before the prototypes")
    student_temperature: Positive = Field(default=0.1, description="temperature of the student's softmax")
    cls_temperature: Positive = Field(
        default=0.04, description="temperature of the targets of class tokens; that of patches is schedule.teacher_temperature"
    )
    center_momentum: Probability = Field(default=0.9, description="share of the old centres kept each step")
    decoder_depth: int = Field(default=1, ge=1, le=32, description="transformer blocks of the decoder")
    decoder_heads: Count = Field(
        default=16, description="attention heads of the decoder, whose tokens are as wide as the tower's"
    )
    norm_pix_loss: bool = Field(default=True, description="each patch's pixels are told as deviations from its own mean")
    clip_weight: NonNegative = Field(default=1.0, description="weight of the image-text term")
    cls_weight: NonNegative = Field(default=1.0, description="weight of the class-token term")
    patch_weight: NonNegative = Field(default=1.0, description="weight of the patch term")
    reconstruction_weight: NonNegative = Field(default=1.0, description="weight of the reconstruction of removed patches")
    no_weight_decay: tuple[Literal["positions", "class_token", "token_embedding"], ...] = Field(
        default=(), description="matrices without weight decay; biases, norms, logit scale and other vectors never have any"
    )
    layerwise_lr_decay: Share = Field(
        default=1.0, description="learning-rate factor from one block of the vision tower to the block below"
    )
    prototype_chunk_size: Count | None = Field(
        default=None,
        description="rows of prototype logits that are in memory at once; null means as many as fill 128 MiB, or 256 MiB where "
        "Triton works on them in place. Changes no result",
    )
