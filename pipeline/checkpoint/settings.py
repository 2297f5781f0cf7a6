"""Settings of checkpoints: what is saved and what is resumed."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.types import (
    Count,
    Length,
    PathName,
    ResumePath,
    Settings,
)


class CheckpointSettings(Settings):
    """What is saved, and what a start takes up again."""

    every: Length = Field(default=Length(3750, "steps"), description="distance of two checkpoints")
    async_save: bool = Field(default=True, description="write while training goes on, from a copy in host memory")
    max_failures: Count = Field(default=3, description="checkpoints in a row that may fail before the run stops")
    keep_last: Count = Field(default=3, description="checkpoints kept, the newest")
    keep_every: Length | None = Field(default=None, description="distance of checkpoints that are kept for ever; null for none")
    keep_best: str | None = Field(
        default=None,
        min_length=1,
        description="metric whose highest checkpoint is kept, such as knn/k20; each evaluation is then saved; null for none",
    )
    mirror: PathName | None = Field(
        default=None,
        min_length=1,
        description="bucket or folder that each checkpoint is copied to, below the run's name, and fetched from; null for none",
    )
    resume: ResumePath = Field(
        default="auto",
        min_length=1,
        description="auto takes the run's newest whole checkpoint, never starts anew, or a checkpoint's path to begin from",
    )
    allow_data_change: bool = Field(
        default=False,
        description="go on over other data than the checkpoint was trained on: at the same step, in the new data's order",
    )
