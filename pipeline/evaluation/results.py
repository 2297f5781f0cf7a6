"""Results of evaluations: metric names, and ``<run>/evaluations/<checkpoint>.json`` with the scores of one checkpoint.

A score has one name everywhere: ``<evaluator>/<metric>`` for the trained network, and for what it is compared with,
``baseline/<baseline>/<evaluator>/<metric>``. Names and files that earlier versions wrote are translated where they are read.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.config.sizes import Size
from pipeline.errors import FoveaError
from pipeline.runtime.locks import lock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import read_json

BASELINES = {"random_init": "random init", "init_from": "init_from", "pixels": "pixels"}
"""What a trained network is compared with, by name, and its title: the same network with random weights or with those that
``init_from`` names, and raw pixels as features."""

_FOLDER = "evaluations"
_LARGEST = 1 << 63
_OLD_BASELINES = {"untrained": "random_init", "start": "init_from", "pixels": "pixels"}
_OLD_NETWORKS = ("trained", "weights")


def baseline_metric(baseline: str, metric: str) -> str:
    """Name of a baseline's metric, ``baseline/<baseline>/<metric>``."""
    return f"baseline/{baseline}/{metric}"


def split_metric(name: str) -> tuple[str, str]:
    """The baseline of a metric, empty for the trained network, and the metric's name without it."""
    parts = name.split("/", 2)
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == "baseline" else ("", name)


def by_network(scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Scores by baseline, in the order of :data:`BASELINES`; those of the trained network come first, under the empty name."""
    networks: dict[str, dict[str, float]] = {name: {} for name in ("", *BASELINES)}
    for name, value in scores.items():
        baseline, metric = split_metric(name)
        networks.setdefault(baseline, {})[metric] = value
    return {name: row for name, row in networks.items() if row}


def current_metric(name: str) -> str:
    """Today's name of a metric in a journal of an earlier version; other names are returned unchanged."""
    first, _, rest = name.partition("/")
    if first not in _OLD_BASELINES or not rest:
        return name
    return baseline_metric(_OLD_BASELINES[first], f"knn/{rest}" if re.fullmatch(r"k\d+", rest) else rest)


@dataclass(frozen=True)
class EvalResult:
    """Scores of one checkpoint, or of pretrained weights.

    Attributes:
        checkpoint: name of the checkpoint, or source of the weights.
        step, samples_seen: how far the checkpoint was trained.
        image_size: side, or height and width, in pixels of the images where an evaluator's settings do not set one.
        queries, bank, classes: images that are evaluated and that are learned from, and classes of the ``knn`` shards; 0 if no
            evaluator uses them.
        scores: by metric.
    """

    checkpoint: str
    step: int = 0
    samples_seen: int = 0
    image_size: Size = 0
    queries: int = 0
    bank: int = 0
    classes: int = 0
    scores: dict[str, float] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return asdict(self)


def write(run: RunDirectory, result: EvalResult) -> Path:
    """Write a checkpoint's result to its file, keeping the scores of other evaluators; returns the file."""
    name = f"{_FOLDER}/{result.checkpoint}.json"
    path = run.own_folder(_FOLDER) / ".lock"
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(path.lstat().st_mode):
            path.unlink()
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags, 0o666), "r+b") as file:  # several evaluations of one checkpoint may end at the same time
        lock(file.fileno(), path)
        before = _read(run.path / name)
        scores = {**before.scores, **result.scores} if before is not None else result.scores
        run.write(name, replace(result, scores=scores).document())
    return run.path / name


def is_evaluated(run: RunDirectory, checkpoint: str) -> bool:
    """Whether a checkpoint has a results file."""
    return (run.path / _FOLDER / f"{checkpoint}.json").exists()


def read_all(run: RunDirectory) -> dict[str, EvalResult]:
    """Results of a run by checkpoint, in the order of their names; skips files that hold none."""
    results = {file.stem: result for file in sorted((run.path / _FOLDER).glob("*.json")) if (result := _read(file)) is not None}
    old = _read(run.path / "evaluation.json", old_knn=True)
    if old is not None:
        newer = results.get(old.checkpoint)
        results[old.checkpoint] = replace(newer, scores={**old.scores, **newer.scores}) if newer is not None else old
    return dict(sorted(results.items()))


def _read(file: Path, *, old_knn: bool = False) -> EvalResult | None:
    try:
        document = read_json(file)
    except (OSError, FoveaError):
        return None
    if not isinstance(document, dict):
        return None
    checkpoint = document.get("checkpoint") if old_knn else file.stem
    if not isinstance(checkpoint, str):
        return None
    counts = {name: _count(document.get(name)) for name in ("step", "samples_seen", "queries", "bank", "classes")}
    scores = _old_knn(document.get("knn")) if old_knn else document.get("scores")
    return EvalResult(checkpoint, **counts, image_size=_size(document.get("image_size")), scores=dict(_numbers(scores)))


def _size(value: Any) -> Size:
    if isinstance(value, list) and len(value) == 2:
        height, width = map(_count, value)
        return (height, width) if height and width else 0
    return _count(value)


def _old_knn(networks: Any) -> dict[str, Any]:
    """Scores of ``evaluation.json``, which an earlier version wrote, as that version named them elsewhere."""
    rows = networks.items() if isinstance(networks, dict) else ()
    return {network: {f"knn/k{k}": value for k, value in row.items()} for network, row in rows if isinstance(row, dict)}


def _numbers(scores: Any) -> Iterator[tuple[str, float]]:
    """Scores by metric; earlier versions nested them by network."""
    for name, value in scores.items() if isinstance(scores, dict) else ():
        baseline = _OLD_BASELINES.get(name)
        if isinstance(value, dict) and (baseline or name in _OLD_NETWORKS):
            own = {metric: score for metric, score in value.items() if _is_number(score)}
            yield from ((baseline_metric(baseline, metric) if baseline else metric, float(own[metric])) for metric in own)
        elif _is_number(value):
            yield name, float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and (value != value or abs(value) < _LARGEST)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and _is_number(value) and value >= 0 else 0
