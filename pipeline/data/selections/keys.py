"""Selections from a table of keys: lists, scores and filters that others made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.index.manifest import Manifest
from pipeline.data.index.selected import MAX_WEIGHT
from pipeline.data.pack.tables import records
from pipeline.data.selections.file import Part, SelectionInfo, write_selection
from pipeline.errors import DataError
from pipeline.untrusted import printable

_MOST_MISSING = 0.5  # fraction of the keys that no sample may have
_NAMED = 3


def select_keys(manifest: Manifest, table: Path, out: Path, *, exclude: bool = False) -> tuple[SelectionInfo, int]:
    """Writes the selection of the samples that a table names.

    Args:
        manifest: the index.
        table: with a column ``key``, and optionally ``shard`` (base name) and ``weight``.
        out: the selection.
        exclude: select all others.

    Returns:
        What was selected, and the number of keys that no sample has.

    Raises:
        DataError: the table cannot be read, a key occurs twice or in several shards, or most keys are unknown.
    """
    weights = _read(table)
    used: set[tuple[str, str]] = set()
    _check_unique(manifest, weights, table)
    counts = {"kept": 0, "left_out": 0}

    def parts() -> Iterator[Part]:
        for number in range(len(manifest.shards)):
            name, rows, own = manifest.shards[number].name, [], []
            for row, key in enumerate(manifest.rows(number).keys):
                pair = next((pair for pair in ((key, name), (key, "")) if pair in weights), None)
                if pair is not None:
                    used.add(pair)
                if (pair is None) == exclude:
                    rows.append(row)
                    own.append(1.0 if pair is None else weights[pair])
            counts["kept"] += len(rows)
            counts["left_out"] += int(manifest.sizes[number]) - len(rows)
            yield Part(number, np.array(rows, dtype=np.int64), np.array(own, dtype=np.float64))
        missing = len(weights) - len(used)
        if missing > _MOST_MISSING * len(weights):
            shown = ", ".join(printable(key, limit=60) for key, _ in list(weights.keys() - used)[:_NAMED])
            raise DataError(
                f"{missing} of {len(weights)} keys are those of no sample: {shown} …",
                where=printable(str(table)),
                hint="Write keys as `fovea shards ls` prints them: paths in the tar without the extension",
            )

    made = {"command": "fovea shards select", "table": table.name, "exclude": exclude}
    info = write_selection(out, parts(), fingerprint=manifest.fingerprint, total=manifest.total, made=made, counts=counts)
    return info, len(weights) - len(used)


def _read(table: Path) -> dict[tuple[str, str], float]:
    weights: dict[tuple[str, str], float] = {}
    for where, row in records(table, "key"):
        key, shard = _text(row.get("key")), _text(row.get("shard"))
        if not key:
            raise DataError("has no key", where=where, hint="Give every row the key of a sample, in a column named key")
        if (key, shard) in weights:
            raise DataError(f"the key {printable(key, limit=60)!r} occurs twice", where=where, hint="Give each sample one row")
        weights[key, shard] = _weight(row.get("weight"), where)
    if not weights:
        raise DataError("the table has no rows", where=printable(str(table)), hint="Give it the column key")
    return weights


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _weight(value: Any, where: str) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 1 / 65536 <= weight <= MAX_WEIGHT:
        raise DataError(
            f"the weight {printable(str(value), limit=40)!r} must lie between 1/65536 and {MAX_WEIGHT:.0f}",
            where=where,
            hint="Leave a sample out of the table instead of giving it weight 0",
        )
    return weight


def _check_unique(manifest: Manifest, weights: dict[tuple[str, str], float], table: Path) -> None:
    """Refuses keys without a shard that several shards have, and names of shards that several have."""
    names = Counter(shard.name for shard in manifest.shards)
    if shared := sorted({shard for _, shard in weights if names[shard] > 1}):
        raise DataError(
            f"{names[shared[0]]} shards are named {printable(shared[0], limit=60)}",
            where=printable(str(table)),
            hint="Leave the column shard empty where keys are unique, or make a selection of each folder's shards",
        )
    plain = {key for key, shard in weights if not shard}
    seen: Counter[str] = Counter()
    for number in range(len(manifest.shards)):
        seen.update(key for key in manifest.rows(number).keys if key in plain)
    twice = [key for key, n in seen.items() if n > 1]
    if twice:
        raise DataError(
            f"{len(twice)} keys occur in several shards: {', '.join(printable(key, limit=60) for key in twice[:_NAMED])}",
            where=printable(str(table)),
            hint="Add a column shard with the base name of the shard",
        )
