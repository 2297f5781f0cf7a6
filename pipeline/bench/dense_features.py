"""Compares the patch features of DetailCLIP and CLIP.

Both are trained on the same synthetic scenes with several seeds, and evaluated by linear segmentation: a linear layer on patch
tokens predicts the shape at each pixel.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.bench.collapse_ablation import read_journal
from pipeline.bench.methods import train
from pipeline.config.load import load
from pipeline.data.pack.synthetic import CLASS_NAMES

METHODS = ("clip", "detailclip")
_SEGMENTATION = {"image_size": 64, "max_train": 1000, "max_val": 500, "epochs": 10}


@dataclass(frozen=True)
class RunResult:
    """Result of one run.

    Attributes:
        method, seed, samples: of the run.
        seconds: of training.
        miou: mean intersection over union of the background and the kinds of shapes, 0 to 1.
        untrained: of the same tower before training.
        knn: accuracy with the class token, 0 to 1.
    """

    method: str
    seed: int
    samples: int
    seconds: float
    miou: float
    untrained: float
    knn: float


def measure(shards: str, *, samples: int, seeds: Sequence[int], ranks: int, directory: Path) -> Iterator[RunResult]:
    """Train both methods with each seed, in turns."""
    for seed in seeds:
        for method in METHODS:
            yield _one(method, shards, samples, seed, ranks, directory / f"{method}-{seed}")


def _one(method: str, shards: str, samples: int, seed: int, ranks: int, directory: Path) -> RunResult:
    name = f"{method}/scenes"
    steps = max(samples // load(name).config.train.global_batch_size, 1)
    held_out = shards.replace("train-", "val-")
    segmentation = {"enabled": True, "every": f"{steps} steps", "train_shards": [shards], "val_shards": [held_out]}
    segmentation |= {"num_classes": len(CLASS_NAMES) + 1, **_SEGMENTATION}
    settings = [
        f"data.shards={json.dumps(shards)}",
        f"launch.num_processes={ranks}",
        f"run.seed={seed}",
        f"train.duration={steps} steps",
        f"schedule.lr.warmup={max(steps // 10, 1)} steps",
        f"evaluation.knn.every={steps} steps",
        f"checkpoint.every={steps} steps",
        *(f"evaluation.segmentation.{key}={json.dumps(value)}" for key, value in segmentation.items()),
    ]
    outcome = train(name, directory, settings)
    metrics, _ = read_journal(directory)
    miou, scores = metrics["segmentation/miou"], outcome["scores"]
    k = max(int(key.split("/k")[1]) for key in scores if key.startswith("knn/"))
    results = miou[max(miou)], miou[min(miou)], scores[f"knn/k{k}"]
    return RunResult(method, seed, outcome["samples_seen"], outcome["seconds"], *results)


def line(result: RunResult) -> str:
    """Describe one run in a line."""
    return (
        f"{result.method}, seed {result.seed}: mIoU {result.miou:.1%} (untrained {result.untrained:.1%}), k-NN {result.knn:.1%}"
    )


def markdown(results: Sequence[RunResult], machine: Mapping[str, str], command: str) -> str:
    """Render the result page."""
    lines = [
        "# Dense features of DetailCLIP and CLIP",
        "",
        f"`{command}`",
        "",
        *(f"- {name}: {value}" for name, value in machine.items()),
    ]
    lines += [
        "- linear segmentation of 500 held-out scenes of 64 pixels, trained on 1000; class token by k-NN; equal samples",
        "",
        "| method | seed | samples | s of training | mIoU | untrained | k-NN |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results:
        figures = f"{one.miou:.1%} | {one.untrained:.1%} | {one.knn:.1%}"
        lines.append(f"| {one.method} | {one.seed} | {one.samples} | {one.seconds:.0f} | {figures} |")
    lines += ["", *_difference(results)]
    return "\n".join(lines) + "\n"


def _difference(results: Sequence[RunResult]) -> list[str]:
    by_seed = {(one.method, one.seed): one.miou for one in results}
    seeds = sorted({one.seed for one in results})
    apart = [
        by_seed["detailclip", s] - by_seed["clip", s] for s in seeds if ("detailclip", s) in by_seed and ("clip", s) in by_seed
    ]
    if not apart:
        return []
    spread = f", from {min(apart):+.1%} to {max(apart):+.1%}" if len(apart) > 1 else ""
    better = sum(difference > 0 for difference in apart)
    mean = statistics.mean(apart)
    return [f"DetailCLIP minus CLIP: {mean:+.1%} mIoU in the mean of {len(apart)} seeds{spread}; better with {better} of them."]
