"""Settings of the weights that a fresh run begins with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import PathName, Settings


class InitSettings(Settings):
    """The weights a fresh run begins with, if not random ones. Never looked at by a run that resumes."""

    source: PathName | None = Field(
        default=None,
        min_length=1,
        description="a run or checkpoint of fovea, a file of weights under timm's or DINOv2's names, or timm:NAME; null for none",
    )
    network: Literal["teacher", "student"] = Field(default="teacher", description="which network of a checkpoint of fovea")
    heads: bool = Field(default=False, description="take the heads of a checkpoint of fovea too, not the backbone alone")
