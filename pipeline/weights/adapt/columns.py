"""Chooses the values of the columns of metadata that guide a run, from the JSON of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.index.manifest import Manifest
from pipeline.data.indexing import HasData, open_storage
from pipeline.data.inspect.columns import MOST_VALUES, columns_of
from pipeline.errors import ConfigError
from pipeline.masking import printable

_INSPECTED = 20_000  # samples whose values are counted
_EACH = 4  # samples of a value, on average: fewer have no mean of their own


@dataclass(frozen=True)
class Guides:
    """Columns that guide a run.

    Attributes:
        columns: entries of ``guidance.columns``.
        reason: where their values are from.
    """

    columns: list[dict[str, Any]]
    reason: str


def guides_of(columns: Sequence[tuple[str, str]], manifest: Manifest, config: HasData, *, already_set: bool) -> Guides | None:
    """Lists the values of columns; ``None`` without columns.

    Every value that is seen is listed, in alphabetical order, so that the list depends on the samples alone.

    Args:
        columns: names, each with ``discourage`` or ``encourage``.
        manifest: index of the training set.
        config: settings of its storage.
        already_set: whether the command line also sets ``guidance``.

    Raises:
        DataError: a column is absent.
        ConfigError: it is named twice, has one value, or has too many for its samples.
    """
    if not columns:
        return None
    if already_set:
        raise ConfigError(
            "guidance is set, and columns are named by --discourage or --encourage",
            where="guidance",
            hint="Use one of both; --config-only writes the columns to a config that can be edited",
        )
    names = [name for name, _ in columns]
    seen = columns_of(manifest, open_storage(config, at_start=True), most=_INSPECTED)
    chosen: list[dict[str, Any]] = []
    parts = []
    for name, direction in columns:
        where, shown = f"--{direction}", printable(repr(name), limit=80)
        if names.count(name) > 1:
            raise ConfigError(f"{shown} is named {names.count(name)} times", where=where, hint="Name each column once")
        seen.require(name, where=where)
        values = seen.values[name]
        most = min(MOST_VALUES, sum(values.values()) // _EACH)
        if not 2 <= len(values) <= most:
            many = f"{'more than ' * (len(values) > MOST_VALUES)}{min(len(values), MOST_VALUES)} values"
            raise ConfigError(
                f"{shown} has {many if len(values) > 1 else 'a single value'} in {sum(values.values())} samples",
                where=where,
                hint=f"Choose a column of 2 to {MOST_VALUES} values, each of which {_EACH} or more samples have on average",
            )
        chosen.append({"name": name, "direction": direction, "values": sorted(values), "weight": 1.0})
        parts.append(f"{printable(name, limit=40)} {sum(values.values())}")
    reason = f"values seen in {seen.samples} of {seen.of} samples (with one: {', '.join(parts)}); no other is used"
    return Guides(chosen, reason)
