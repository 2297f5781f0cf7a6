"""A large batch in micro-batches, in what is learned: beside the batch at once, naive accumulation, and the small batch alone.

Steps are compared in ``tests/training/test_accumulation.py`` and ``tests/methods/test_clip_ranks.py``; here whole runs are, by
k-NN over several seeds. All runs of a method see equally many samples; the rate follows the square root of the batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.bench.methods import train
from pipeline.bench.reproduction.agreement import interval, quantile
from pipeline.config.load import load
from pipeline.errors import FoveaError
from pipeline.evaluation.results import baseline_metric

METHODS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "dinov2": ("dinov2/cifar10_small", ("method.koleo_group_size={small}",), "method.target_batch=micro"),
    "simclr": ("simclr/cifar10_small_vit", (), "method.grad_cache=false"),
    "clip": ("clip/cifar10_small", (), "method.grad_cache=false"),
}
"""Config, settings of all runs, and the setting that makes accumulation naive, by method."""


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        shards: pattern of labelled training shards with captions, ``val-*.tar`` beside them.
        directory: of the runs; those that have ended are not repeated.
        seeds: number of seeds.
        epochs: length of a run; ``None`` for the config's.
        large: global batch size.
        small: size of a micro-batch, and of the small batch; a divisor of ``large``.
    """

    shards: str
    directory: Path
    seeds: int = 3
    epochs: float | None = None
    large: int = 512
    small: int = 32


@dataclass(frozen=True)
class BatchResult:
    """One run.

    Attributes:
        method: its name.
        way: how the batch was computed.
        seed: of the run.
        knn, untrained: accuracy of the trained and of the untrained network, 0 to 1.
        failed: error of a failed run.
    """

    method: str
    way: str
    seed: int
    knn: float = math.nan
    untrained: float = math.nan
    failed: str = ""


def ways(options: Options, naive: str) -> dict[str, tuple[str, ...]]:
    """Settings of each way to compute a batch, by its name; the first is what the others are compared with."""
    large, small = f"train.global_batch_size={options.large}", f"train.micro_batch_size={options.small}"
    return {
        f"{options.large} at once": (large,),
        f"{options.large} in micro-batches of {options.small}": (large, small),
        f"{options.large} in micro-batches of {options.small}, each alone": (large, small, naive),
        f"{options.small}": (f"train.global_batch_size={options.small}",),
    }


def measure(methods: Sequence[str], options: Options) -> Iterator[BatchResult]:
    """Run all ways of each method, seed by seed."""
    for method in methods:
        _, _, naive = METHODS[method]
        for seed in range(options.seeds):
            for number, (way, settings) in enumerate(ways(options, naive).items()):
                folder = options.directory / f"{method}-{number}-{seed}"
                try:
                    yield _one(method, way, seed, settings, folder, options)
                except FoveaError as error:
                    yield BatchResult(method, way, seed, failed=str(error))


def _one(method: str, way: str, seed: int, settings: Sequence[str], folder: Path, options: Options) -> BatchResult:
    name, common, _ = METHODS[method]
    reference = load(name).config.train.global_batch_size
    every = [
        f"data.shards={json.dumps(options.shards)}",
        f"run.seed={seed}",
        "optim.lr_scaling.rule=sqrt",
        f"optim.lr_scaling.reference_batch={reference}",
        "evaluation.knn.every=100000 steps",
        "tracking.enabled=false",
        *(text.format(small=options.small) for text in common),
        *_length(options.epochs),
    ]
    scores = train(name, folder, [*every, *settings])["scores"]
    metric = max((each for each in scores if each.startswith("knn/k")), key=lambda each: int(each.removeprefix("knn/k")))
    return BatchResult(method, way, seed, scores[metric], scores.get(baseline_metric("random_init", metric), math.nan))


def _length(epochs: float | None) -> list[str]:
    return [] if epochs is None else [f"train.duration={epochs:g} epochs", f"schedule.lr.warmup={epochs / 10:g} epochs"]


def line(result: BatchResult) -> str:
    """One line of a log."""
    name = f"{result.method}, {result.way}, seed {result.seed}"
    return f"{name}: {result.failed}" if result.failed else f"{name}: k-NN {result.knn:.3f}"


def markdown(results: Sequence[BatchResult], machine: Mapping[str, str], command: str) -> str:
    """The page."""
    lines = ["# Small batches", "", f"`{command}`", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += [
        "k-NN of held-out images, means over seeds with 95 % intervals of Student's t. All runs of a method see equally many "
        "samples, and the peak rate follows the square root of the batch. *Each alone*: negatives, or Sinkhorn's targets, of the "
        "micro-batch only, as where gradients are merely added up. The difference is that to the batch at once, by seed.",
        "",
        "| method | batch | k-NN | difference | untrained | seeds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for method in dict.fromkeys(result.method for result in results):
        ended = [result for result in results if result.method == method and not result.failed]
        names = list(dict.fromkeys(result.way for result in ended))
        base = {result.seed: result.knn for result in ended if result.way == names[0]}
        for way in names:
            own = [result for result in ended if result.way == way]
            paired = [result.knn - base[result.seed] for result in own if result.seed in base]
            cells = [method, way, interval([result.knn for result in own]).percent(), "" if way == names[0] else _points(paired)]
            untrained = [result.untrained for result in own if math.isfinite(result.untrained)]
            cells += [interval(untrained).percent() if untrained else "", str(len(own))]
            lines.append("| " + " | ".join(cells) + " |")
    failed = [f"- {line(result)}" for result in results if result.failed]
    return "\n".join([*lines, *(["", *failed] if failed else []), ""])


def _points(differences: Sequence[float]) -> str:
    if not differences:
        return ""
    mean = sum(differences) / len(differences)
    if len(differences) < 2:
        return f"{100 * mean:+.1f}"
    squares = sum((value - mean) ** 2 for value in differences)
    error = math.sqrt(squares / (len(differences) - 1) / len(differences))
    return f"{100 * mean:+.1f} ± {100 * quantile(len(differences) - 1) * error:.1f}"
