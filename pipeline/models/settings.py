"""Vision backbone settings."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from pipeline.config.types import Count, Positive, Settings


class ModelSettings(Settings):
    """Vision backbone: a timm model name, or an architecture given by width, depth, heads and patch size."""

    # No source prefixes such as hf-hub: or local-dir:, which would let an untrusted run's config make timm load foreign files.
    timm_name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.]+$",
        description="name of a timm vision transformer or ResNet; leave the architecture's fields unset with it",
    )
    in_channels: int | None = Field(
        default=None,
        ge=1,
        le=16,
        description="channels of the images; null means those of data.channels, or 3. Weights for RGB images are extended by the "
        "rule init_from.input_channels",
    )
    embed_dim: Count | None = Field(default=None, description="token width")
    depth: Count | None = Field(default=None, description="number of transformer blocks")
    num_heads: Count | None = Field(default=None, description="attention heads per block")
    patch_size: Count | None = Field(default=None, description="side of a patch in pixels")
    mlp_ratio: Positive = Field(default=4.0, description="ratio of the MLP's hidden width to the token width")
    registers: int = Field(default=0, ge=0, le=64, description="number of register tokens")
    stem: Literal["patch", "conv", "small", "small_pooled"] = Field(
        default="patch",
        description="patch embedding: one convolution (patch) or a stack of 3x3 convolutions (conv). Of a ResNet: patch is the "
        "stem that timm gives it; small is one 3x3 convolution and no pooling, for images of 32 pixels; small_pooled keeps the "
        "pooling, for images of 64 pixels, or for a quarter of the cost at 32",
    )
    resnet_width: int | None = Field(
        default=None,
        ge=8,
        multiple_of=8,
        description="channels of a ResNet's first stage; each of the three next has twice those of the one before. null means "
        "timm's, 64. 32 with one block a stage is a network of 1.2 million parameters",
    )
    resnet_blocks: tuple[Count, Count, Count, Count] | None = Field(
        default=None, description="residual blocks in each of a ResNet's four stages; null means timm's, [2, 2, 2, 2] of resnet18"
    )
    channels_last: bool = Field(
        default=False,
        description="compute a ResNet with channels innermost in memory (NHWC), which convolutions in bf16 are faster with. "
        "Weights and checkpoints are laid out as before; results differ by rounding",
    )
    init: Literal["timm", "dino", "mocov3", "open_clip", "simclr", "byol"] = Field(
        default="timm",
        description="initialization, named after the released code it follows: timm is DINOv2's for transformers and "
        "torchvision's for ResNets; dino draws larger tokens; mocov3 is Xavier-uniform; mocov3, simclr and "
        "byol start the last batch norm of each ResNet block at 0",
    )
    cls_pos_embed: bool = Field(
        default=False,
        description="with registers and learned positions: give the class token a position parameter of its own (DINOv2's "
        "code) instead of merging it into the token (timm); exports merge the two",
    )
    ffn: Literal["mlp", "swiglu"] = Field(default="mlp", description="feed-forward layer of a block")
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = Field(
        default="gelu",
        description="activation of an mlp: exact GELU, x * sigmoid(1.702 x) (OpenAI's CLIP), or the tanh approximation (SigLIP)",
    )
    pre_norm: bool = Field(
        default=False,
        description="CLIP's tower: a norm before the first block, and a patch embedding without bias; learned positions only",
    )
    norm_eps: Positive | None = Field(
        default=None,
        description="constant added to the variance in layer norms; null means 1e-6, or 1e-5 with pre_norm or pos_embed=rope",
    )
    pooling: Literal["class_token", "attention"] = Field(
        default="class_token",
        description="image feature of the tower: a class token, or attention pooling over the patches in its place (SigLIP)",
    )
    layer_scale: Positive | None = Field(default=1e-5, description="initial LayerScale of a block's branches; null for none")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="stochastic depth rate of the student")
    drop_path_schedule: Literal["constant", "linear"] = Field(
        default="constant",
        description="drop_path per block: the same for all (DINOv2), or rising linearly from 0 in the first to drop_path "
        "in the last (DINO, DeiT)",
    )
    batched_drop_path: bool = Field(
        default=True,
        description="compute each branch only for a random subset of the batch (DINOv2, saves compute); false drops each "
        "sample independently",
    )
    pos_embed: Literal["learned", "rope"] = Field(
        default="learned", description="position embedding: learned and added (DINOv2), or rotary in the attention (DINOv3)"
    )
    pos_embed_interpolation: Literal["antialias", "offset", "plain"] = Field(
        default="antialias",
        description="resampling of learned positions to another grid: antialias as timm and DINOv2's models with "
        "registers, offset as DINOv2's others (grid stretched by 0.1 patch, no antialiasing), or plain "
        "bicubic",
    )
    rope_base: Positive = Field(default=100.0, description="base of the rotary periods")
    rope_rescale_coords: float | None = Field(
        default=None,
        gt=1,
        description="scale a training batch's rotary coordinates by a random factor between 1/this and this; null disables it",
    )
    rope_jitter_coords: float | None = Field(
        default=None, gt=1, description="like rope_rescale_coords, with a separate factor per axis; null disables it"
    )
    rope_shift_coords: Positive | None = Field(
        default=None,
        description="shift a training batch's rotary coordinates, which run from -1 to 1 across the image, by up to ± "
        "this; null disables it",
    )
    untie_local_norm: bool = Field(default=False, description="give local crops a final norm of their own in training (DINOv3)")

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.in_channels or 3

    @property
    def patch_side(self) -> int | None:
        """Patch side in pixels, read from the timm name if that is set; None if it cannot be determined."""
        match = re.search(r"patch(\d+)", self.timm_name) if self.timm_name else None
        return int(match[1]) if match else self.patch_size
