"""Settings of a new run's initial weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import PathName, Settings


class InitSettings(Settings):
    """Initial weights of a new run, if not random. A run that resumes ignores them."""

    source: PathName | None = Field(
        default=None,
        min_length=1,
        description="fovea run or checkpoint, weights file under timm's or DINOv2's names, or timm:NAME; null for random weights",
    )
    network: Literal["teacher", "student"] = Field(default="teacher", description="network to take from a fovea checkpoint")
    heads: bool = Field(default=False, description="load the heads of a fovea checkpoint too, not only the backbone")
