"""Settings of tracking: what is logged to MLflow."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.types import (
    Settings,
    TrackingUri,
)


class TrackingSettings(Settings):
    """What is told to MLflow."""

    enabled: bool = Field(default=True, description="log to MLflow")
    uri: TrackingUri | None = Field(
        default=None,
        description="MLflow tracking URI; null means MLFLOW_TRACKING_URI, or else a SQLite file in the run's directory",
    )
    experiment: str | None = Field(
        default=None, min_length=1, description="MLflow experiment; null means MLFLOW_EXPERIMENT_NAME, or else fovea"
    )
