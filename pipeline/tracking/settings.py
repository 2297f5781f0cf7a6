"""Settings of experiment tracking with MLflow."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.types import (
    Settings,
    TrackingUri,
)


class TrackingSettings(Settings):
    """Whether and where metrics are logged to MLflow."""

    enabled: bool = Field(default=True, description="log to MLflow")
    uri: TrackingUri | None = Field(
        default=None,
        description="MLflow tracking URI; null means MLFLOW_TRACKING_URI if set, else a SQLite file in the run directory",
    )
    experiment: str | None = Field(
        default=None, min_length=1, description="MLflow experiment name; null means MLFLOW_EXPERIMENT_NAME if set, else fovea"
    )
