"""Sections of the settings that stand for themselves: towers, storage, first weights, data sets, health."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from pipeline.fields import Count, FilePath, NonNegative, PathName, Positive, Settings, Shards


class ModelSettings(Settings):
    """The vision tower: a timm name, or an architecture spelled out by width, depth, heads and patch."""

    # No source such as hf-hub: or local-dir:, from which timm would take settings that a stranger's run names.
    timm: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.]+$",
        description="name of a timm vision transformer or ResNet; then the architecture's fields stay unset",
    )
    width: Count | None = Field(default=None, description="width of a token")
    depth: Count | None = Field(default=None, description="transformer blocks")
    heads: Count | None = Field(default=None, description="attention heads of a block")
    patch: Count | None = Field(default=None, description="side of a patch, pixels")
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
    class_position: bool = Field(
        default=False,
        description="with registers and learned positions: the class token's position is a parameter of its own (DINOv2's "
        "code) instead of part of the token (timm); exports merge the two",
    )
    ffn: Literal["mlp", "swiglu"] = Field(default="mlp", description="kind of feed-forward layer")
    layer_scale: Positive | None = Field(default=1e-5, description="initial scale of a block's branches; null means none")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="probability of skipping a branch of the student")
    drop_path_rates: Literal["constant", "linear"] = Field(
        default="constant",
        description="drop_path of each block: the same for all (DINOv2), or rising from 0 in the first to drop_path in the last "
        "(DINO, DeiT)",
    )
    drop_path_mode: Literal["subset", "rows"] = Field(
        default="subset",
        description="compute a branch for a fixed number of samples only (DINOv2, saves the work), or drop each sample by itself",
    )
    positions: Literal["learned", "rope"] = Field(
        default="learned", description="positions that are learned and added (DINOv2), or turned into the attention (DINOv3)"
    )
    position_resampling: Literal["antialias", "offset", "plain"] = Field(
        default="antialias",
        description="learned positions on another grid: as timm and DINOv2's models with registers, as DINOv2's others (grid "
        "stretched by 0.1 patch, no antialiasing), or bicubic alone",
    )
    rope_base: Positive = Field(default=100.0, description="base of the rotary periods")
    rope_rescale: float | None = Field(
        default=None, gt=1, description="rotary coordinates of a training batch are stretched by up to this factor, or shrunk"
    )
    rope_jitter: float | None = Field(default=None, gt=1, description="as rope_rescale, each axis by itself")
    rope_shift: Positive | None = Field(
        default=None, description="rotary coordinates of a training batch, -1 to 1 across the picture, are shifted by up to this"
    )
    local_norm: bool = Field(default=False, description="local crops have a final norm of their own while training (DINOv3)")

    @property
    def patch_side(self) -> int | None:
        """Patch side in pixels, read from the timm name if need be; None where the name does not tell."""
        found = re.search(r"patch(\d+)", self.timm) if self.timm else None
        return int(found[1]) if found else self.patch


class StorageSettings(Settings):
    """How shards in object storage are reached, and what a node keeps of them."""

    endpoint: str | None = Field(default=None, description="URL of an S3-compatible or Azure server; null means AWS_ENDPOINT_URL")
    region: str | None = Field(default=None, description="region of the bucket; null means AWS_REGION")
    anonymous: bool = Field(default=False, description="read public buckets without credentials")
    mode: Literal["cache", "direct"] = Field(
        default="cache", description="keep whole shards on the node's disk, or read each sample by range"
    )
    cache: FilePath | None = Field(
        default=None, description="folder of kept shards; null means FOVEA_CACHE, SLURM_TMPDIR or the temporary folder"
    )
    cache_gb: Positive | None = Field(default=None, description="most GB kept; null means four fifths of the free disk")
    free_gb: NonNegative = Field(default=2.0, description="GB of the disk that stay free")
    part_mb: Count = Field(default=16, description="MB of one request of a download")
    parallel: int = Field(default=8, ge=1, le=256, description="requests of a download at a time")
    timeout: Positive = Field(default=60.0, description="seconds one request may take")
    retries: int = Field(default=5, ge=0, le=100, description="quick retries of one request")
    grace: NonNegative = Field(default=600.0, description="seconds a training waits for a storage that is away, before it stops")


class InitSettings(Settings):
    """The weights a fresh run begins with, if not random ones. Never looked at by a run that resumes."""

    source: PathName | None = Field(
        default=None,
        min_length=1,
        description="a run or checkpoint of fovea, a file of weights under timm's or DINOv2's names, or timm:NAME; null for none",
    )
    network: Literal["teacher", "student"] = Field(default="teacher", description="which network of a checkpoint of fovea")
    heads: bool = Field(default=False, description="take the heads of a checkpoint of fovea too, not the backbone alone")


class SourceSettings(Settings):
    """One of several data sets that are mixed."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.+-]+$", description="what the data set is called in counts")
    shards: Shards = Field(min_length=1, description="its shards: a path or URL with {000..123} or *, or a list of them")
    weight: Positive | None = Field(
        default=None, description="share of the samples, relative to the other sets' weights; null means by size and repeat"
    )
    repeat: Positive | None = Field(
        default=None, description="how often its samples come while a set with repeat 1 is seen once; null means 1"
    )


class HealthSettings(Settings):
    """What is done when a rank stands still, and when the loss is no longer a number."""

    stall_factor: float = Field(
        default=20.0, gt=1, description="a phase of a step that lasts this many median steps has stalled, and ends the attempt"
    )
    stall_floor: Positive = Field(
        default=300.0, description="seconds that a phase of a step may always take; should be less than launch.timeout"
    )
    start_limit: Positive = Field(default=3600.0, description="seconds the start and the first three steps may take, each")
    evaluate_limit: Positive = Field(default=7200.0, description="seconds an evaluation may take")
    checkpoint_limit: Positive = Field(default=3600.0, description="seconds a checkpoint may take")
    rewind_after: Count | None = Field(
        default=None,
        description="non-finite steps in a row after which training goes back to the last checkpoint; null means never",
    )
    rewind_margin: int = Field(
        default=100, ge=0, description="steps before the first non-finite one that are left out too after going back"
    )
    max_rewinds: Count = Field(default=2, description="times a run goes back before it stops instead")
    peak_tflops: Positive | None = Field(
        default=None, description="TFLOP/s of a GPU that MFU is measured against; null reads a table by the GPU's name"
    )
