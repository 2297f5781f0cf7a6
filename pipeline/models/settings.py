"""Settings of the vision tower."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, Positive, Settings


class ModelSettings(Settings):
    """The vision tower: a timm name, or an architecture spelled out by width, depth, heads and patch."""

    # No source such as hf-hub: or local-dir:, from which timm would take settings that a stranger's run names.
    timm_name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.]+$",
        description="name of a timm vision transformer or ResNet; then the architecture's fields stay unset",
    )
    embed_dim: Count | None = Field(default=None, description="width of a token")
    depth: Count | None = Field(default=None, description="transformer blocks")
    num_heads: Count | None = Field(default=None, description="attention heads of a block")
    patch_size: Count | None = Field(default=None, description="side of a patch, pixels")
    mlp_ratio: Positive = Field(default=4.0, description="hidden width of a block's MLP over the token width")
    registers: int = Field(default=0, ge=0, le=64, description="register tokens")
    stem: Literal["patch", "conv", "small"] = Field(
        default="patch",
        description="patch embedding: one convolution, or a stack of 3x3 ones; of a ResNet, small is one 3x3 convolution and no "
        "pooling, for pictures of 32 pixels",
    )
    init: Literal["timm", "dino", "mocov3", "open_clip", "simclr", "byol"] = Field(
        default="timm",
        description="whose released code the initial weights follow: timm is DINOv2's for transformers and torchvision's for "
        "ResNets; dino draws larger tokens; mocov3 is Xavier-uniform; mocov3, simclr and byol start the last batch norm of a "
        "ResNet's block at 0",
    )
    cls_pos_embed: bool = Field(
        default=False,
        description="with registers and learned positions: the class token's position is a parameter of its own (DINOv2's "
        "code) instead of part of the token (timm); exports merge the two",
    )
    ffn: Literal["mlp", "swiglu"] = Field(default="mlp", description="kind of feed-forward layer")
    layer_scale: Positive | None = Field(default=1e-5, description="initial scale of a block's branches; null means none")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="probability of skipping a branch of the student")
    drop_path_schedule: Literal["constant", "linear"] = Field(
        default="constant",
        description="drop_path of each block: the same for all (DINOv2), or rising from 0 in the first to drop_path in the last "
        "(DINO, DeiT)",
    )
    batched_drop_path: bool = Field(
        default=True,
        description="compute a branch only for a random subset of the batch (DINOv2, saves the work); false drops each sample on "
        "its own",
    )
    pos_embed: Literal["learned", "rope"] = Field(
        default="learned", description="positions that are learned and added (DINOv2), or turned into the attention (DINOv3)"
    )
    pos_embed_interpolation: Literal["antialias", "offset", "plain"] = Field(
        default="antialias",
        description="learned positions on another grid: as timm and DINOv2's models with registers, as DINOv2's others (grid "
        "stretched by 0.1 patch, no antialiasing), or bicubic alone",
    )
    rope_base: Positive = Field(default=100.0, description="base of the rotary periods")
    rope_rescale_coords: float | None = Field(
        default=None, gt=1, description="rotary coordinates of a training batch are stretched by up to this factor, or shrunk"
    )
    rope_jitter_coords: float | None = Field(default=None, gt=1, description="as rope_rescale, each axis by itself")
    rope_shift_coords: Positive | None = Field(
        default=None, description="rotary coordinates of a training batch, -1 to 1 across the picture, are shifted by up to this"
    )
    untie_local_norm: bool = Field(
        default=False, description="local crops have a final norm of their own while training (DINOv3)"
    )

    @property
    def patch_side(self) -> int | None:
        """Patch side in pixels, read from the timm name if need be; None where the name does not tell."""
        found = re.search(r"patch(\d+)", self.timm_name) if self.timm_name else None
        return int(found[1]) if found else self.patch_size
