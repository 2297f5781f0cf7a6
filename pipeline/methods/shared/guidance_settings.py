"""Settings of guidance by metadata."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.types import Positive, Settings, Values


class ColumnSettings(Settings):
    """A column of the samples' JSON."""

    name: str = Field(min_length=1, max_length=64, description="key in the JSON object of a sample")
    direction: Literal["discourage", "encourage"] = Field(
        description="discourage: features are to lose the column (a site, a scanner); encourage: they are to carry it (an organ)"
    )
    values: Values = Field(
        min_length=2,
        max_length=256,
        description="its values, strings or whole numbers; a sample with another one takes no part. `fovea adapt` lists those "
        "that the shards have",
    )
    weight: Positive = Field(default=1.0, description="weight of the term")

    @property
    def label(self) -> str:
        """Its name in loss terms, metrics and parameters: only letters, digits and underscores."""
        return re.sub(r"[^A-Za-z0-9]", "_", self.name)


class GuidanceSettings(Settings):
    """Columns of metadata that features should not, or should, carry; none by default."""

    columns: tuple[ColumnSettings, ...] = Field(
        default=(), max_length=16, description="columns of the samples' JSON, each with name, direction, values and weight"
    )
    discourage_by: Literal["means", "reversal"] = Field(
        default="means",
        description="means: the variance between the mean class tokens of the values, over the total variance, is a loss, with "
        "running means. reversal: a linear probe learns the column, and the network gets its gradient reversed (arXiv "
        "1505.07818), for comparison",
    )
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="share of the running sums of means that a step keeps; 0.9 averages about ten steps"
    )

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if len({column.label for column in self.columns}) < len(self.columns):
            raise ValueError("columns: two have the same name, of which only letters and digits count")
        return self

    def of(self, direction: str) -> tuple[ColumnSettings, ...]:
        """Columns of a direction."""
        return tuple(column for column in self.columns if column.direction == direction)
