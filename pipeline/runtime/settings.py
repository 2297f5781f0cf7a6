"""Settings of the run itself: its name and folder, how ranks are started, the watchdog."""

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
    """Which run this is."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9][\w.+-]*$", description="name of the run; the config file's name if not given"
    )
    directory: FilePath | None = Field(
        default=None, json_schema_extra=RUNTIME, description="folder of everything the run writes; null means runs/<name>"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of order, crops, masks and initial weights")

    @property
    def folder(self) -> Path:
        """The run's directory, resolved."""
        return self.directory if self.directory is not None else Path("runs") / self.name


class LaunchSettings(Settings):
    """How ranks are started on this machine."""

    num_processes: Count | None = Field(default=None, description="processes; null means one for each GPU, or one")
    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto", description="collective library; auto is nccl with GPUs, else gloo"
    )
    deepspeed_init: Literal["deepspeed", "accelerate"] = Field(
        default="deepspeed",
        description="who sets DeepSpeed up: fovea, or Hugging Face Accelerate (which needs transformers); the run is the same",
    )
    timeout: Positive = Field(default=600.0, description="seconds a collective may take")


class HealthSettings(Settings):
    """What is done when a rank stands still, and when the loss is no longer a number."""

    hang_factor: float = Field(
        default=20.0, gt=1, description="a phase of a step that lasts this many median steps has stalled, and ends the attempt"
    )
    hang_floor: Positive = Field(
        default=300.0, description="seconds that a phase of a step may always take; should be less than launch.timeout"
    )
    startup_timeout: Positive = Field(default=3600.0, description="seconds the start and the first three steps may take, each")
    evaluation_timeout: Positive = Field(default=7200.0, description="seconds an evaluation may take")
    checkpoint_timeout: Positive = Field(default=3600.0, description="seconds a checkpoint may take")
    rollback_after: Count | None = Field(
        default=None,
        description="non-finite steps in a row after which training goes back to the last checkpoint; null means never",
    )
    rollback_margin: int = Field(
        default=100, ge=0, description="steps before the first non-finite one that are left out too after going back"
    )
    max_rollbacks: Count = Field(default=2, description="times a run goes back before it stops instead")
    peak_tflops: Positive | None = Field(
        default=None, description="TFLOP/s of a GPU that MFU is measured against; null reads a table by the GPU's name"
    )
