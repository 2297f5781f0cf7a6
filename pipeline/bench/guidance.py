"""Guidance by metadata on scenes of three sites: how much a linear probe reads the site from class tokens, and what k-NN is.

The site of a scene is drawn beside its class and casts a colour on the whole image, which survives the augmentation.
"""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.bench.methods import fovea, train
from pipeline.data.order.random import uniforms
from pipeline.data.pack import synthetic
from pipeline.data.pack.generated import write_generated
from pipeline.errors import FoveaError

SITES = ("north", "south", "west")
_CASTS = np.array([[1.0, 0.72, 0.55], [0.6, 1.0, 0.7], [0.62, 0.66, 1.0]], dtype=np.float32)  # gain of red, green and blue
_SITE = 0x517E  # identifies the random draw
_VERSION = 1
OFF = "no guidance"
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


def ways(weights: Sequence[float]) -> dict[str, tuple[str, ...]]:
    """Settings by the name of a way of training: without guidance, and discouraging the site by each term with each weight."""
    chosen: dict[str, tuple[str, ...]] = {OFF: ()}
    for by in ("means", "reversal"):
        for weight in weights:
            column = {"name": "site", "direction": "discourage", "values": list(SITES), "weight": weight}
            settings = {"columns": [column], "discourage_by": by}
            chosen[f"{by}, weight {weight:g}"] = (f"guidance={json.dumps(settings)}",)
    return chosen


@dataclass(frozen=True)
class GuidanceResult:
    """Result of one run.

    Attributes:
        way: how it was trained.
        seed: of the run.
        knn: k-NN accuracy of the class, 0 to 1.
        site: accuracy of a linear probe of the site; a guess has a third.
        site_knn: k-NN accuracy of the site.
        failed: error of a failed run.
    """

    way: str
    seed: int
    knn: float = math.nan
    site: float = math.nan
    site_knn: float = math.nan
    failed: str = ""


def write_sites(directory: Path, *, train: int, val: int, seed: int = 0) -> None:
    """Writes the scenes as shards, with the site in the JSON and as a number in a member of its own."""
    write_generated(
        directory,
        "sites",
        lambda index: _sample(seed, index),
        {"version": _VERSION, "scenes": synthetic.VERSION, "train": train, "val": val, "seed": seed, "casts": _CASTS.tolist()},
        train=train,
        val=val,
        samples_per_shard=1000,
    )


def _sample(seed: int, index: int) -> dict[str, Any]:
    scene = synthetic.render(seed, index)
    site = int(uniforms(np.array([index], dtype=np.uint64), 1, seed, _SITE)[0, 0] * len(SITES))
    image = io.BytesIO()
    cast = np.clip(scene.image * _CASTS[site], 0, 255).astype(np.uint8)
    Image.fromarray(cast).save(image, "JPEG", quality=synthetic.JPEG_QUALITY)
    return {"jpg": image.getvalue(), "cls": scene.label, "site": str(site), "json": {"label": scene.label, "site": SITES[site]}}


def measure(
    *, weights: Sequence[float], seeds: Sequence[int], samples: int, images: int, ranks: int, directory: Path
) -> Iterator[GuidanceResult]:
    """Train every way with every seed; runs that have ended are not repeated.

    Args:
        weights: of the terms.
        seeds: of the runs.
        samples: samples of each run.
        images: training images.
        ranks: ranks of each run.
        directory: where runs and shards are written.
    """
    shards = directory / "shards"
    write_sites(shards, train=images, val=1000)
    for seed in seeds:
        for way, settings in ways(weights).items():
            folder = directory / f"{way.replace(', ', '-').replace(' ', '_')}-{seed}"
            try:
                yield _one(way, seed, folder, shards, [*settings, f"train.duration={samples} samples"], ranks)
            except FoveaError as error:
                yield GuidanceResult(way, seed, failed=str(error))


def _one(way: str, seed: int, folder: Path, shards: Path, settings: Sequence[str], ranks: int) -> GuidanceResult:
    common = [
        f"data.shards={shards}/sites-train-*.tar",
        f"run.seed={seed}",
        "tracking.enabled=false",
        f"launch.num_processes={ranks}",
        "evaluation.knn.enabled=false",
        "schedule.lr.warmup=20 steps",
        "checkpoint.every=10000 steps",
    ]
    if not (folder / "outcome.json").exists():
        train("dinov2/scenes_vit_tiny", folder, [*common, *settings])
    scores = {label: _scores(folder, shards, label) for label in ("cls", "site")}
    return GuidanceResult(
        way, seed, knn=scores["cls"]["knn/k20"], site=scores["site"]["linear/top1"], site_knn=scores["site"]["knn/k20"]
    )


def _scores(run: Path, shards: Path, label: str) -> dict[str, float]:
    """Scores of held-out scenes by their class or by their site."""
    file = run / f"scores-{label}.json"
    data = [f"evaluation.knn.train_shards={shards}/sites-train-*.tar", f"evaluation.knn.val_shards={shards}/sites-val-*.tar"]
    probe = ["evaluation.linear.layers=[1]", "evaluation.linear.epochs=10"]
    chosen = ["--knn", *(["--linear"] if label == "site" else [])]
    fovea(["eval", str(run), *chosen, "--output", str(file), f"data.label_extension={label}", *data, *probe])
    scores: dict[str, float] = json.loads(file.read_text())["scores"]
    return scores


def line(result: GuidanceResult) -> str:
    """One line of a log."""
    name = f"{result.way}, seed {result.seed}"
    if result.failed:
        return f"{name}: {result.failed}"
    return f"{name}: class {result.knn:.3f}, site {result.site:.3f} (k-NN {result.site_knn:.3f})"


def markdown(results: Sequence[GuidanceResult], machine: Mapping[str, str], command: str) -> str:
    """The page: means over seeds with 95 % intervals, in percent."""
    head = ["trained with", "class, k-NN", "site, linear probe", "site, k-NN"]
    rows = []
    for way in dict.fromkeys(result.way for result in results):
        own = [result for result in results if result.way == way and not result.failed]
        rows.append([way, *(_percent([getattr(r, name) for r in own]) for name in ("knn", "site", "site_knn"))])
    table = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    failed = [line(result) for result in results if result.failed]
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = (
        "DINOv2 on scenes of three sites with a colour cast each. Accuracy in percent on 1 000 held-out scenes (a guess has 10 "
        "for the class and 33 for the site), means over seeds with 95 % intervals of Student's t."
    )
    return "\n".join(["# Guidance by metadata", "", text, "", *table, "", *failed, f"`{command}`", "", about, ""])


def _percent(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * _T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values)):.1f}"
