"""Settings of experiment tracking: MLflow, Weights & Biases, TensorBoard."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import (
    Settings,
    TrackingUri,
)


class TrackingSettings(Settings):
    """Which trackers receive the journal, and where they are."""

    enabled: bool = Field(default=True, description="copy the journal of the run to trackers")
    to: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = Field(
        default=("mlflow",),
        min_length=1,
        description="trackers; wandb and tensorboard need pip install 'fovea[wandb]' and 'fovea[tensorboard]'. W&B is configured "
        "by its own variables (WANDB_MODE, WANDB_PROJECT, …); TensorBoard's event file is in the run directory",
    )
    uri: TrackingUri | None = Field(
        default=None,
        description="MLflow tracking URI; null means MLFLOW_TRACKING_URI if set, else a SQLite file in the run directory",
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        description="MLflow experiment and W&B project; null means MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT if set, else fovea",
    )
