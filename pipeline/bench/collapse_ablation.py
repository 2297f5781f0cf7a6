"""Collapse ablations: removes what prevents collapse in methods without negatives, and varies what negatives need.

Every trial is a config for synthetic scenes with one changed setting; all trials of one question see the same samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.bench.methods import train
from pipeline.config.load import load
from pipeline.errors import FoveaError
from pipeline.evaluation.results import baseline_metric
from pipeline.tracking.journal import read


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        question: group of trials.
        name: description of the difference.
        config: config name.
        settings: overrides.
    """

    question: str
    name: str
    config: str
    settings: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name of its directory."""
        return f"{self.question}-{self.name}".replace(" ", "_").replace(",", "")


LOCALS = ("method.views.local_count=2", "method.views.local_size=16", "method.views.local_scale=[0.15, 0.5]")
TRIALS = (
    Trial("byol", "as it is", "byol/scenes"),
    Trial("byol", "without predictor", "byol/scenes", ("method.predictor=false",)),
    Trial("dino", "as it is", "dino/scenes"),
    Trial("dino", "without centring", "dino/scenes", ("method.center_momentum=1.0",)),
    Trial("dino", "without sharpening", "dino/scenes", ("schedule.teacher_temperature.start=0.1",)),
    Trial("dino", "without batch norm", "dino/scenes", ("method.head_norm=none",)),
    Trial("mocov2", "as it is", "mocov2/scenes"),
    Trial("mocov2", "without batch norm", "mocov2/scenes", ("method.head_norm=none",)),
    Trial("simclr", "batch 128", "simclr/scenes"),
    Trial("simclr", "batch 16", "simclr/scenes", ("train.global_batch_size=16",)),
    Trial("logo", "local crops attracted", "mocov2/scenes", LOCALS),
    Trial("logo", "and repelled from each other", "mocov2/scenes", (*LOCALS, "method.local_repulsion={}")),
)
QUESTIONS = tuple(dict.fromkeys(trial.question for trial in TRIALS))
_EVALUATIONS = 4
_METRICS = ("train/feature_std", "train/feature_rank", "train/target_entropy", "train/prototype_entropy")


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial.

    Attributes:
        trial: the trial.
        steps, samples: of the run.
        knn: accuracy after each number of samples, 0 to 1; for the highest ``k`` of the config.
        untrained: of the same network before training.
        loss: the last one logged, nats.
        metrics: last logged values of the collapse metrics.
        alerts: raised by fovea, by name.
        failed: error of a failed run.
        curves: all logged values of the collapse metrics, by samples.
    """

    trial: Trial
    steps: int = 0
    samples: int = 0
    knn: Mapping[int, float] | None = None
    untrained: float | None = None
    loss: float = math.nan
    metrics: Mapping[str, float] | None = None
    alerts: Mapping[str, str] | None = None
    failed: str = ""
    curves: Mapping[str, Mapping[int, float]] | None = None


def measure(questions: Sequence[str], shards: str, *, samples: int, ranks: int, directory: Path) -> Iterator[TrialResult]:
    """Train the trials of each question, one run after another."""
    for trial in TRIALS:
        if trial.question in questions:
            try:
                yield _one(trial, shards, samples, ranks, directory / trial.slug)
            except FoveaError as error:
                yield TrialResult(trial, failed=str(error))


def _one(trial: Trial, shards: str, samples: int, ranks: int, directory: Path) -> TrialResult:
    batch = load(trial.config, trial.settings).config.train.global_batch_size
    steps = max(samples // batch, _EVALUATIONS)
    settings = [
        f"data.shards={json.dumps(shards)}",
        f"launch.num_processes={ranks}",
        f"run.name={trial.slug}",
        f"train.duration={steps} steps",
        f"schedule.lr.warmup={max(steps // 10, 1)} steps",
        f"evaluation.knn.every={math.ceil(steps / _EVALUATIONS)} steps",
        f"checkpoint.every={steps} steps",
        *trial.settings,
    ]
    train(trial.config, directory, settings)
    return read_result(trial, directory)


def read_result(trial: Trial, directory: Path) -> TrialResult:
    """Read the result of a trial from its finished run."""
    batch = load(trial.config, trial.settings).config.train.global_batch_size
    outcome = json.loads((directory / "outcome.json").read_text())
    logged, alerts = read_journal(directory)
    names = [name for name in logged if name.startswith("knn/k")]
    best = max(names, key=lambda name: int(name.removeprefix("knn/k")))
    by_samples = {name: {step * batch: value for step, value in sorted(points.items())} for name, points in logged.items()}
    kept = [name for name in _METRICS if name in logged]
    return TrialResult(
        trial,
        steps=outcome["steps"],
        samples=outcome["samples_seen"],
        knn=by_samples[best],
        untrained=outcome["scores"].get(baseline_metric("random_init", best)),
        loss=_last(logged.get("train/loss", {})),
        metrics={name.removeprefix("train/"): _last(logged[name]) for name in kept},
        curves={name.removeprefix("train/"): by_samples[name] for name in kept},
        alerts=alerts,
    )


def read_journal(directory: Path) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """A run's metrics by name and step, and its alerts."""
    metrics: dict[str, dict[int, float]] = {}
    alerts: dict[str, str] = {}
    for path in sorted((directory / "tracking").glob("journal-*.jsonl")):
        for _, record in read(path):
            values: dict[str, Any] = record.get("values", {})
            if record["kind"] == "metrics":
                for name, value in values.items():
                    metrics.setdefault(name, {})[int(record["step"])] = float(value)
            elif record["kind"] == "tags":
                alerts |= {str(key).removeprefix("alert/"): str(v) for key, v in values.items() if str(key).startswith("alert/")}
    return metrics, alerts


def _last(points: Mapping[int, float]) -> float:
    return points[max(points)] if points else math.nan


def line(result: TrialResult) -> str:
    """Describe one trial in a line."""
    if result.failed or not result.knn:
        return f"{result.trial.question}, {result.trial.name}: {result.failed or 'no evaluation'}"
    return f"{result.trial.question}, {result.trial.name}: k-NN {_last(result.knn):.1%}, {result.metrics}"


def markdown(results: Sequence[TrialResult], machine: Mapping[str, str], command: str) -> str:
    """Render the result page."""
    lines = ["# Ablations of what prevents collapse", "", f"`{command}`", "", *(f"- {k}: {v}" for k, v in machine.items()), ""]
    metrics = "std of features | rank | entropy of targets | entropy of prototypes"
    lines += [f"| question | trial | samples | steps | k-NN | untrained | loss | {metrics} |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for one in results:
        if one.failed or not one.knn:
            lines.append(f"| {one.trial.question} | {one.trial.name} | {line(one)} |||||||||")
            continue
        ends = [f"{(one.metrics or {})[name]:.2f}" if name in (one.metrics or {}) else "" for name in _names()]
        start = "" if one.untrained is None else f"{one.untrained:.1%}"
        figures = [str(one.samples), str(one.steps), f"{_last(one.knn):.1%}", start, f"{one.loss:.3f}", *ends]
        lines.append(f"| {one.trial.question} | {one.trial.name} | {' | '.join(figures)} |")
    lines += ["", "One run of each, seed 0. k-NN of 1000 held-out scenes by their 20 nearest of 4000, by samples seen:", ""]
    for one in results:
        if one.knn:
            curve = ", ".join(f"{samples}: {value:.1%}" for samples, value in one.knn.items())
            lines.append(f"- {one.trial.question}, {one.trial.name}: {curve}")
    raised = []
    for one in results:
        raised += [f"- {one.trial.question}, {one.trial.name}: **{name}**: {text}" for name, text in (one.alerts or {}).items()]
    lines += ["", "Alerts that fovea raised:", "", *(raised or ["- none"])]
    return "\n".join(lines) + "\n"


def _names() -> list[str]:
    return [name.removeprefix("train/") for name in _METRICS]
