"""Retention rule of checkpoints: the last ones, one per interval permanently, and the best. The same on disk and in a mirror."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.files import fsync_path
from pipeline.errors import FoveaError
from pipeline.untrusted import plain_name, read_json

BEST = "best.json"


@dataclass(frozen=True)
class Mark:
    """The properties of a checkpoint that the retention rule uses.

    Attributes:
        name: its directory's name.
        step: completed optimizer steps.
        serial: sequence number within the run; after a rollback, a later checkpoint may have an earlier step.
        scores: by metric, of an evaluation at this step.
    """

    name: str
    step: int
    serial: int
    scores: Mapping[str, float]

    @classmethod
    def of(cls, name: str, manifest: Mapping[str, Any]) -> Mark:
        """The mark of a checkpoint, from its manifest."""
        step = int(manifest["step"])
        scores = manifest.get("scores", {}) if manifest.get("scored", step) == step else {}
        if "judged" in manifest:  # each evaluation has its own interval: other scores are from earlier steps
            scores = {metric: value for metric, value in scores.items() if metric in manifest["judged"]}
        return cls(name, step, int(manifest.get("serial", 0)), scores)


@dataclass(frozen=True)
class Retention:
    """The retention rule.

    Attributes:
        last: number of newest checkpoints to keep.
        every: keep the first checkpoint at or after each multiple of this many steps permanently; 0 for none.
        best: metric whose highest-scoring checkpoint is kept, ``None`` for none.
        fewest: number of newest checkpoints that are kept at least: two, because the newest may turn out to be damaged.
    """

    last: int = 3
    every: int = 0
    best: str | None = None
    fewest: int = 2

    def best_of(self, marks: Iterable[Mark]) -> Mark | None:
        """The mark with the highest score, the first of equal ones; ``None`` if none has a score."""
        metric = self.best or ""
        scored = [mark for mark in marks if math.isfinite(mark.scores.get(metric, math.nan))]
        return max(scored, key=lambda mark: (mark.scores[metric], -mark.serial), default=None) if metric else None

    def superfluous(self, marks: Iterable[Mark]) -> list[Mark]:
        """Checkpoints to delete, oldest first."""
        ordered = sorted(marks, key=lambda mark: (mark.serial, mark.step))
        kept = {best.name} if (best := self.best_of(ordered)) else set()
        if self.every:
            first: dict[int, Mark] = {}
            for mark in sorted(ordered, key=lambda mark: mark.step):
                first.setdefault(mark.step // self.every, mark)
            kept |= {mark.name for window, mark in first.items() if window}
        return [mark for mark in ordered[: -max(self.last, self.fewest)] if mark.name not in kept]


def write_best(directory: Path, metric: str, best: Mark) -> None:
    """Writes atomically to ``best.json`` which checkpoint is the best."""
    temporary = directory / f".{BEST}"
    with temporary.open("w") as file:
        json.dump({"checkpoint": best.name, "step": best.step, "metric": metric, "score": best.scores[metric]}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / BEST)
    fsync_path(directory)


def read_best(directory: Path) -> dict[str, Any]:
    """Reads ``best.json``: checkpoint (a plain name), step, metric and score; empty if it is missing or invalid."""
    try:
        best = read_json(directory / BEST, limit=1 << 20)
        plain_name(best["checkpoint"], where=BEST)
        score = float(best["score"]) if isinstance(best["score"], int | float) else math.nan
        return {"checkpoint": best["checkpoint"], "step": int(best["step"]), "metric": str(best["metric"]), "score": score}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, FoveaError):
        return {}
