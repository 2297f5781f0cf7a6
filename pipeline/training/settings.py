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
    """Scaling of the peak learning rate with the global batch size."""

    rule: Literal["sqrt", "linear", "none"] = Field(
        default="sqrt",
        description="scaling rule: sqrt multiplies the peak by sqrt(global batch size / reference_batch) (DINOv2), linear by "
        "the ratio itself (DINO, MoCo, SimCLR), none leaves it unchanged",
    )
    reference_batch: Count | None = Field(
        default=None, description="global batch size at which the peak is not scaled; null means 1024 for sqrt and 256 for linear"
    )

    def scaled(self, lr: float, global_batch_size: int) -> float:
        """Scale the learning rate ``lr`` for the given global batch size."""
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
    momentum: Probability = Field(default=0.9, description="momentum coefficient of LARS and SGD")
    trust_coefficient: Positive = Field(default=1e-3, description="trust coefficient (eta) of LARS")
    lr_scaling: LrScalingSettings = Field(
        default=LrScalingSettings(), description="scaling of the peak learning rate with the global batch size"
    )
    betas: tuple[Probability, Probability] = Field(
        default=(0.9, 0.999), description="AdamW and LAMB: decay rates of the first and second moments"
    )
    eps: Positive = Field(default=1e-8, description="AdamW and LAMB: constant added to the root of the second moment")

    @property
    def moments(self) -> int:
        """Number of moments that the optimizer keeps of each parameter, fp32."""
        return 2 if self.name in ("adamw", "lamb") else 1


class CurveSettings(Settings):
    """Schedule of a value: linear warm-up from ``start`` to ``peak``, then ``shape`` from ``peak`` to ``end``."""

    start: NonNegative = Field(description="value at the first sample")
    peak: NonNegative | None = Field(default=None, description="value after the warm-up; null means start")
    end: NonNegative | None = Field(default=None, description="value at the last sample; null means peak")
    warmup: Length = Field(default=Length(0), description="length of the linear warm-up from start to peak")
    per_epoch: bool = Field(
        default=False,
        description="update the value once per epoch instead of every step, as the code of MoCo v2 (learning rate), DINO and "
        "DetailCLIP (teacher temperature) does",
    )
    shape: Literal["cosine", "cosine_to_last", "linear", "constant"] = Field(
        default="cosine",
        description="change from peak to end; cosine_to_last is the variant of DINOv3; constant stays at the peak",
    )


class LearningRateCurve(CurveSettings):
    """Learning rate schedule: a curve whose peak is scaled by ``optim.lr_scaling``."""

    start: NonNegative = Field(default=0.0, description="learning rate at the first sample")
    peak: Positive = Field(default=2e-4, description="learning rate after the warm-up, before optim.lr_scaling is applied")
    end: NonNegative = Field(default=1e-6, description="learning rate at the last sample")


class ScheduleSettings(Settings):
    """Schedules over the run, as functions of the samples seen."""

    lr: LearningRateCurve = Field(default=LearningRateCurve(), description="learning rate schedule")
    weight_decay: CurveSettings = Field(default=CurveSettings(start=0.04, end=0.2), description="weight decay schedule")
    teacher_momentum: CurveSettings = Field(
        default=CurveSettings(start=0.994, end=1.0),
        description="momentum of the teacher's EMA update: the share of the old teacher weights that is kept each step",
    )
    teacher_temperature: CurveSettings = Field(
        default=CurveSettings(start=0.04, peak=0.07, warmup=Length(37500, "steps"), shape="constant"),
        description="temperature of the teacher's softmax",
    )


class TrainSettings(Settings):
    """The training loop."""

    global_batch_size: Count = Field(default=1024, description="samples per optimizer step, over all ranks")
    micro_batch_size: Count | None = Field(
        default=None, description="samples per forward pass of one rank; null means the rank's entire share of the global batch"
    )
    duration: Length = Field(default=Length(125_000, "steps"), description="length of the run, in steps, samples or epochs")
    pause_at: Length | None = Field(
        default=None,
        json_schema_extra=RUNTIME,
        description="step at which the run evaluates, saves and stops, as fovea sweep uses it; the schedules are those of the "
        "entire duration, and without this setting the run continues",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="number format of the student's forward and backward passes"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        json_schema_extra=RUNTIME,
        description="DeepSpeed ZeRO stage: shard nothing (0), the optimizer state (1), also the gradients (2), also the "
        "parameters (3)",
    )
    offload: Literal["none", "cpu"] = Field(
        default="none",
        json_schema_extra=RUNTIME,
        description="where AdamW runs and keeps its fp32 state: on the GPU, or in host memory (saves 12 bytes per parameter on "
        "the GPUs, makes steps slower; stages 1 to 3)",
    )
    log_every: Count = Field(default=10, json_schema_extra=RUNTIME, description="steps between two log lines")
    threads: Count | None = Field(
        default=None,
        json_schema_extra=RUNTIME,
        description="CPU compute threads per rank; null divides the cores among the ranks",
    )
    record_batches: bool = Field(
        default=False,
        json_schema_extra=RUNTIME,
        description="write each rank's sample keys, pixel digest and loss terms of every step to <run>/batches (slow, for "
        "audits)",
    )
    signatures: bool = Field(
        default=True,
        json_schema_extra=RUNTIME,
        description="record a signature of every step in <run>/signatures, at most 200 bytes per step and rank, with which "
        "fovea replay compares",
    )
    verify_every: Count | None = Field(
        default=None,
        json_schema_extra=RUNTIME,
        description="find silent corruption: do one step in so many twice on every rank and compare both bit for bit; a "
        "difference ends the attempt and names rank and node, which a Slurm job then avoids; needs train.deterministic=true on "
        "a GPU; null means never",
    )
    activation_checkpointing: bool = Field(
        default=False,
        json_schema_extra=RUNTIME,
        description="recompute the activations of each block in the backward pass instead of storing them (less memory, about a "
        "third slower)",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        json_schema_extra=RUNTIME,
        description="apply torch.compile to each transformer block: auto does on a GPU with Triton and a C compiler, in ZeRO "
        "stages 0 to 2; true needs a C++ compiler on CPU",
    )
    cuda_graphs: bool = Field(
        default=False,
        json_schema_extra=RUNTIME,
        description="with train.compile: replay the compiled blocks as CUDA graphs, for small models whose steps are dominated "
        "by kernel launches; uses additional memory; ZeRO stages 0 to 2, one micro-batch, no activation "
        "checkpointing; not yet run on a GPU",
    )
    fp8: Literal["off", "teacher", "all"] = Field(
        default="off",
        description="towers whose blocks compute matrix products in 8-bit floats: none, those without gradient, or all; needs "
        "bf16 and a GPU of compute capability 8.9, and changes the numbers",
    )
    deterministic: bool = Field(default=False, description="raise an error for operations whose result varies from run to run")
    max_consecutive_nonfinite: Count = Field(
        default=10,
        json_schema_extra=RUNTIME,
        description="consecutive steps with a non-finite loss or gradient after which the run stops",
    )
