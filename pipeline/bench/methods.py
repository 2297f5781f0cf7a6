"""Compares methods trained on the same synthetic scenes for the same time, by k-NN and zero-shot accuracy."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.load import available, load
from pipeline.config.schema import METHODS
from pipeline.data.pack.synthetic import CLASS_NAMES
from pipeline.errors import FoveaError, TrainingError
from pipeline.evaluation.results import baseline_metric
from pipeline.runtime.interpreter import alone_environment, module_command

PROBE = 20  # steps from which the number of steps is estimated


@dataclass(frozen=True)
class Row:
    """Result of one method.

    Attributes:
        method: its name.
        config: the config it was trained with.
        steps, samples: of the run.
        seconds: of training alone.
        knn, untrained, pixels: k-NN accuracy of the backbone, of the same one untrained, and of raw pixels, 0 to 1.
        zeroshot: zero-shot accuracy, for methods with a text encoder.
        failed: error of a failed run.
    """

    method: str
    config: str
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    knn: float | None = None
    untrained: float | None = None
    pixels: float | None = None
    zeroshot: float | None = None
    failed: str = ""


def configs() -> dict[str, str]:
    """The config for synthetic scenes of each method that has one, by method name."""
    names: dict[str, str] = {}
    for name in sorted(available()):
        if "scenes" in name.split("/")[-1]:
            method = load(name).config.method.name
            if method in METHODS:
                names.setdefault(method, name)
    return names


def measure(
    methods: Sequence[str], shards: str, *, minutes: float, ranks: int, directory: Path, samples: int | None = None
) -> Iterator[Row]:
    """Train one method after another for about the same time; yields each result when it is available.

    Args:
        methods: names, of those in :func:`configs`.
        shards: training shards of scenes, ``*val-*.tar`` beside them.
        minutes: of training, per method.
        ranks: number of processes.
        directory: output directory of the runs.
        samples: samples per method, instead of minutes.
    """
    for method in methods:
        try:
            yield _one(method, shards, minutes, ranks, directory / method, samples)
        except FoveaError as error:
            yield Row(method, configs()[method], failed=str(error))


def _one(method: str, shards: str, minutes: float, ranks: int, directory: Path, samples: int | None) -> Row:
    name = configs()[method]
    common = [f"data.shards={json.dumps(shards)}", f"launch.num_processes={ranks}", "tracking.enabled=false"]
    if samples is None:
        short = [f"train.duration={PROBE} steps", "schedule.lr.warmup=1 steps", "evaluation.knn.enabled=false"]
        probe = train(name, directory / "probe", [*common, *short])
        steps = max(int(60 * minutes / (probe["seconds"] / PROBE)), PROBE)
    else:
        steps = max(samples // load(name).config.train.global_batch_size, 1)
    lengths = [f"train.duration={steps} steps", f"schedule.lr.warmup={max(steps // 10, 1)} steps"]
    often = [f"evaluation.knn.every={steps} steps", f"checkpoint.every={steps} steps"]
    outcome = train(name, directory / "run", [*common, *lengths, *often])
    scores = outcome["scores"]
    k = max(int(key.split("/k")[1]) for key in scores if key.startswith("knn/"))
    knn = scores[f"knn/k{k}"]
    untrained, pixels = (scores[baseline_metric(baseline, f"knn/k{k}")] for baseline in ("random_init", "pixels"))
    zeroshot = _zeroshot(directory) if _compares(method) else None
    return Row(method, name, steps, outcome["samples_seen"], outcome["seconds"], knn, untrained, pixels, zeroshot)


def _compares(method: str) -> bool:
    return "max_logit_scale" in METHODS[method].model_fields  # the temperature of image-text contrast


def train(config: str, directory: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train a config with ``fovea train`` and return its recorded outcome.

    Raises:
        TrainingError: it failed; contains the last line of its output.
    """
    fovea(["train", config, f"run.directory={json.dumps(str(directory))}", *overrides])
    outcome: dict[str, Any] = json.loads((directory / "outcome.json").read_text())
    return outcome


def _zeroshot(directory: Path) -> float:
    classes, sentences = directory / "classes.txt", directory / "sentences.txt"
    classes.write_text("\n".join(CLASS_NAMES) + "\n")
    sentences.write_text("a {}\n")
    fovea(["eval", str(directory / "run"), "--zeroshot", str(classes), "--templates", str(sentences)])
    newest = max((directory / "run" / "evaluations").glob("*.json"))
    document = json.loads(newest.read_text())
    return float(document["scores"]["zeroshot/top1"])


def fovea(arguments: Sequence[str]) -> None:
    """Run a command of fovea in a process of its own.

    Raises:
        TrainingError: it failed; contains the last line of its output.
    """
    done = subprocess.run(
        module_command("launch.cli.main", *arguments), env=alone_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no output"])[-1]
        raise TrainingError(
            f"`fovea {arguments[0]} {arguments[1]}` ended with {done.returncode}: {last}",
            where="fovea bench methods",
            hint="Run that command alone to see its output",
        )


def line(row: Row) -> str:
    """Describe one row in a line."""
    if row.failed:
        return f"{row.method}: {row.failed}"
    return f"{row.method}: k-NN {row.knn:.1%} after {row.samples} samples in {row.seconds:.0f} s"


def markdown(rows: Sequence[Row], machine: dict[str, str], command: str, each: str) -> str:
    """Render the result page."""
    lines = [f"# k-NN of each method on synthetic scenes after {each}", "", f"`{command}`", ""]
    lines += [*(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["| method | config | samples | s of training | k-NN | untrained | raw pixels | zero-shot |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        figures = [_percent(x) for x in (row.knn, row.untrained, row.pixels, row.zeroshot)]
        lines.append(f"| {row.method} | {row.config} | {row.samples} | {row.seconds:.0f} | {' | '.join(figures)} |")
    notes = []
    for row in rows:
        if row.failed:
            notes.append(f"- {row.method} was not trained: {row.failed}")
        elif row.knn is not None and row.untrained is not None and row.knn <= row.untrained:
            notes.append(f"- {row.method} is not above its untrained network after this.")
    lines += ["", "One run of each, seed 0; k-NN of 1000 held-out scenes by their 20 nearest of 4000.", *notes]
    return "\n".join(lines) + "\n"


def _percent(x: float | None) -> str:
    return f"{x:.1%}" if x is not None else ""
