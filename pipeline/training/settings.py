"""Settings of the training loop: optimizer, schedules, batch sizes, precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import (
    RUNTIME,
    Count,
    Length,
    NonNegative,
    Positive,
    Probability,
    Settings,
)


class LrScalingSettings(Settings):
    """How the peak learning rate follows the global batch size."""

    rule: Literal["sqrt", "linear", "none"] = Field(
        default="sqrt",
        description="sqrt multiplies the peak by sqrt(global batch size / reference_batch) (DINOv2), linear by the ratio itself "
        "(DINO, MoCo, SimCLR), none leaves it",
    )
    reference_batch: Count | None = Field(
        default=None, description="batch size at which the peak is as given; null is 1024 for sqrt and 256 for linear"
    )

    def scaled(self, lr: float, global_batch_size: int) -> float:
        """The learning rate ``lr`` for a global batch of so many samples."""
        if self.rule == "none":
            return lr
        ratio = global_batch_size / (self.reference_batch or {"sqrt": 1024, "linear": 256}[self.rule])
        return lr * (ratio**0.5 if self.rule == "sqrt" else ratio)


class OptimSettings(Settings):
    """The optimizer."""

    name: Literal["adamw", "lamb", "lars", "sgd"] = Field(
        default="adamw",
        description="optimizer; lars and sgd are for convolutional networks with batch norm, not for transformers",
    )
    momentum: Probability = Field(default=0.9, description="momentum of LARS and SGD")
    trust_coefficient: Positive = Field(default=1e-3, description="LARS: trust coefficient eta")
    lr_scaling: LrScalingSettings = Field(
        default=LrScalingSettings(), description="how the peak learning rate follows the global batch size"
    )
    betas: tuple[Probability, Probability] = Field(default=(0.9, 0.999), description="decay rates of AdamW's and LAMB's moments")
    eps: Positive = Field(default=1e-8, description="added to the root of the second moment")


class LearningRateCurve(Settings):
    """The learning rate over the run: a linear warm-up from ``start`` to ``peak``, then ``shape`` to ``end``."""

    start: NonNegative = Field(default=0.0, description="learning rate at the first sample")
    peak: Positive = Field(default=2e-4, description="learning rate after the warm-up, before optim.lr_scaling")
    end: NonNegative = Field(default=1e-6, description="learning rate at the last sample")
    warmup: Length = Field(default=Length(0), description="length of the rise from start to the peak")
    per_epoch: bool = Field(
        default=False,
        description="the value changes between epochs only, as in the code of MoCo v2 (learning rate), DINO and DetailCLIP "
        "(temperature of the teacher)",
    )
    shape: Literal["cosine", "cosine_to_last", "linear", "constant"] = Field(
        default="cosine",
        description="way from the peak to end; cosine_to_last is DINOv3's; constant stays at the peak",
    )


class Curve(Settings):
    """A value over the run: linear from ``start`` to ``peak`` during ``warmup``, then ``shape`` from ``peak`` to ``end``."""

    start: NonNegative = Field(description="value at the first sample")
    peak: NonNegative | None = Field(default=None, description="value after warm-up; null means start")
    end: NonNegative | None = Field(default=None, description="value at the last sample; null means the peak")
    warmup: Length = Field(default=Length(0), description="length of the way from start to peak")
    per_epoch: bool = Field(
        default=False,
        description="the value changes between epochs only, as in the code of MoCo v2 (learning rate), DINO and DetailCLIP "
        "(temperature of the teacher)",
    )
    shape: Literal["cosine", "cosine_to_last", "linear", "constant"] = Field(
        default="cosine",
        description="way from the peak to end; cosine_to_last is DINOv3's; constant stays at the peak",
    )


class ScheduleSettings(Settings):
    """What changes while a run goes on, all in samples seen."""

    lr: LearningRateCurve = Field(default=LearningRateCurve(), description="learning rate")
    weight_decay: Curve = Field(default=Curve(start=0.04, end=0.2), description="weight decay")
    teacher_momentum: Curve = Field(default=Curve(start=0.994, end=1.0), description="share of the old teacher kept each step")
    teacher_temperature: Curve = Field(
        default=Curve(start=0.04, peak=0.07, warmup=Length(37500, "steps"), shape="constant"),
        description="temperature of the teacher's targets",
    )


class TrainSettings(Settings):
    """The loop."""

    global_batch_size: Count = Field(default=1024, description="samples of one optimizer step over all ranks")
    micro_batch_size: Count | None = Field(
        default=None, description="samples of one forward pass of a rank; null means the rank's whole share"
    )
    duration: Length = Field(default=Length(125_000, "steps"), description="length of the run")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="number format of the student's forward and backward pass"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        json_schema_extra=RUNTIME,
        description="DeepSpeed ZeRO stage: shard nothing (0), optimizer state (1), also gradients (2), also all weights (3)",
    )
    offload: Literal["none", "cpu"] = Field(
        default="none",
        json_schema_extra=RUNTIME,
        description="where AdamW works and keeps its fp32 state: on the GPU, or in host memory (12 bytes a parameter "
        "less on the GPUs, slower steps; stages 1 to 3)",
    )
    log_every: Count = Field(default=10, json_schema_extra=RUNTIME, description="steps between two logged lines")
    threads: Count | None = Field(
        default=None, json_schema_extra=RUNTIME, description="compute threads of a rank; null shares the cores out"
    )
    record_batches: bool = Field(
        default=False,
        json_schema_extra=RUNTIME,
        description="write every step's sample keys, pixel digest and terms of each rank to <run>/batches (slow; for audits)",
    )
    activation_checkpointing: bool = Field(
        default=False,
        json_schema_extra=RUNTIME,
        description="activation checkpointing: forget a block's activations and compute them again (less memory, a third slower)",
    )
    compile: bool = Field(
        default=False, json_schema_extra=RUNTIME, description="torch.compile each transformer block; needs a C++ compiler on CPU"
    )
    cuda_graphs: bool = Field(
        default=False,
        json_schema_extra=RUNTIME,
        description="with train.compile: replay the compiled blocks as CUDA graphs, for small models whose steps are mostly "
        "launches; takes memory of its own; ZeRO stages 0 to 2, one micro-batch, without recompute; not yet run on a GPU",
    )
    fp8: Literal["off", "teacher", "all"] = Field(
        default="off",
        description="matrix products of the towers' blocks in 8-bit floats: of no tower, of those that no gradient goes through, "
        "or of all; needs bf16 and a GPU of compute capability 8.9, and gives other numbers",
    )
    deterministic: bool = Field(default=False, description="refuse operations whose result varies from run to run")
    max_consecutive_nonfinite: Count = Field(
        default=10, json_schema_extra=RUNTIME, description="non-finite steps in a row that stop the run"
    )
