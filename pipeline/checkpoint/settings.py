"""Checkpoint settings: what is saved, kept, mirrored and resumed."""

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
    """When checkpoints are saved, which are kept, and what a start resumes from."""

    every: Length = Field(default=Length(3750, "steps"), description="interval between two checkpoints")
    async_save: bool = Field(default=True, description="copy the state to host memory and write it while training continues")
    snapshot_every: Length | None = Field(
        default=None,
        description="interval between two snapshots in host memory (/dev/shm), from which launch.restarts continues; on several "
        "nodes each keeps a copy of its neighbour's too; null takes none",
    )
    max_failures: Count = Field(default=3, description="failed checkpoints in a row after which the run stops")
    keep_last: Count = Field(default=3, description="number of most recent checkpoints to keep")
    keep_every: Length | None = Field(
        default=None, description="interval between checkpoints that are never deleted; null keeps none permanently"
    )
    keep_best: str | None = Field(
        default=None,
        min_length=1,
        description="metric, such as knn/k20, whose highest-scoring checkpoint is kept; saves a checkpoint at each "
        "evaluation; null for none",
    )
    mirror: PathName | None = Field(
        default=None,
        min_length=1,
        description="bucket or folder to which each checkpoint is copied, under the run's name, and from which missing "
        "ones are fetched; null for none",
    )
    resume: ResumePath = Field(
        default="auto",
        min_length=1,
        description="auto resumes from the run's newest complete checkpoint, never starts from scratch; a path starts "
        "from that checkpoint",
    )
    allow_data_change: bool = Field(
        default=False,
        description="allow resuming on data other than the checkpoint's: training continues at the same step, in the new "
        "data's order",
    )
