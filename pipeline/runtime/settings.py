"""Settings of a run's name and directory, of the launch, and of the watchdog."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.config.types import (
    RUNTIME,
    Count,
    FilePath,
    Positive,
    Settings,
)


class RunSettings(Settings):
    """Name, directory and seed of the run."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9][\w.+-]*$", description="name of the run; by default the name of the config file"
    )
    directory: FilePath | None = Field(
        default=None,
        json_schema_extra=RUNTIME,
        description="run directory, for everything the run writes; null means runs/<name>",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="random seed of data order, crops, masks and initial weights")

    @property
    def folder(self) -> Path:
        """The run's directory, resolved."""
        return self.directory if self.directory is not None else Path("runs") / self.name


class LaunchSettings(Settings):
    """How ranks are started on this node."""

    num_processes: Count | None = Field(
        default=None, description="number of processes (ranks); null means one per GPU, or one without GPUs"
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto", description="collective communication backend; auto means nccl with GPUs, else gloo"
    )
    deepspeed_init: Literal["deepspeed", "accelerate"] = Field(
        default="deepspeed",
        description="what initializes DeepSpeed: fovea, or Hugging Face Accelerate (needs transformers); the computation "
        "is the same",
    )
    timeout: Positive = Field(default=600.0, description="timeout of a collective, seconds")
    restarts: int = Field(
        default=0,
        ge=0,
        description="how often ranks that died or hung are started again within the launch, or within the Slurm job, from the "
        "newest snapshot (checkpoint.snapshot_every) or checkpoint",
    )
    preload: bool | None = Field(
        default=None,
        description="start ranks as forks of one process that has imported everything, so that it is imported once, while the "
        "data are checked; null does so on hosts without a GPU",
    )


class WatchdogSettings(Settings):
    """What happens when a rank hangs or the loss is not finite."""

    hang_factor: float = Field(
        default=20.0,
        gt=1,
        description="a phase of a training step longer than this many median steps counts as a hang and ends the attempt",
    )
    hang_floor: Positive = Field(
        default=300.0,
        description="seconds below which a phase of a step never counts as a hang; must be less than launch.timeout",
    )
    startup_timeout: Positive = Field(
        default=3600.0, description="timeout of startup, and of each of the first three steps, seconds"
    )
    evaluation_timeout: Positive = Field(default=7200.0, description="timeout of an evaluation, seconds")
    checkpoint_timeout: Positive = Field(default=3600.0, description="timeout of a checkpoint, seconds")
    rollback_after: Count | None = Field(
        default=None,
        description="consecutive non-finite steps after which training rolls back to the last checkpoint; null disables rollback",
    )
    rollback_margin: int = Field(
        default=100, ge=0, description="number of steps before the first non-finite one that are also skipped after a rollback"
    )
    max_rollbacks: Count = Field(default=2, description="maximum number of rollbacks; one more stops the run")
    peak_tflops: Positive | None = Field(
        default=None,
        description="peak TFLOP/s of one GPU, for the model FLOPs utilization (MFU); null looks it up by the GPU's name",
    )
