"""HTML page of a run: scores, curves, and visualizations of the network's features.

Everything is read from the run directory (journals, attempts, newest checkpoint) and from its shards; nothing is fetched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.checkpoint.files import Saved
from pipeline.config.schema import Config
from pipeline.config.sizes import grid_of, scaled, size_text
from pipeline.data.inputs import prepare
from pipeline.errors import FoveaError
from pipeline.evaluation.gallery import Gallery, varied
from pipeline.evaluation.principal import principal
from pipeline.evaluation.results import read_all, split_metric
from pipeline.reports import images, page, preview
from pipeline.reports.figures import Chart, Line
from pipeline.reports.history import History, read_history
from pipeline.reports.page import number, percent
from pipeline.runtime.clock import clock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.weights.from_checkpoint import load_trained, newest

if TYPE_CHECKING:
    from collections.abc import Sequence

CROPS, PCA, QUERIES, NEIGHBOURS = 4, 8, 6, 6
"""Number of samples shown with their crops, images in the PCA, and rows and columns of the neighbour table."""
_BANK = 4000  # maximum number of images searched
_THUMB = 216  # maximum size in pixels of a thumbnail in the file; the page shows it at half size
_DRAW = 0xE7A1  # random stream of the draw, the one of the k-NN evaluation
_NETWORKS = {
    "trained": "trained network",
    "random_init": "same network, random init",
    "init_from": "same network, initial weights",
    "pixels": "raw pixels",
}
_SCHEDULES = {"lr", "weight_decay", "teacher_momentum", "teacher_temperature", "epoch", "skipped_steps", "loss"}
_TITLES = {
    "dino_local": "DINO, local crops",
    "dino_global": "DINO, global crops",
    "ibot": "iBOT, masked patches",
    "koleo": "KoLeo",
    "prototype_entropy": "entropy of prototypes, 1 = all in use",
    "target_entropy": "entropy of targets, 1 = uniform",
    "teacher_student_top1_agreement": "student agrees with teacher",
    "dino_loss_vs_log_k": "DINO loss below log K",
}
_SHARES = {"prototype_entropy", "target_entropy", "teacher_student_top1_agreement"}


def write(run: Path, config: Config, out: Path, *, facts: dict[str, str] | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: the run directory.
        config: its settings.
        out: the HTML file to write.
        facts: additional lines for the list beside the scores, or replacements for those of the same name read from the run;
            names that begin with k-NN are dropped, since the table holds them.

    Returns:
        ``out``.

    Raises:
        FoveaError: a run without a checkpoint, a checkpoint of another architecture, or missing shards.
    """
    import torch

    from pipeline.methods.registry import build_seeded_method

    directory = RunDirectory(run)
    saved, history = newest(run), read_history(directory)
    inputs = prepare(config, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, untrained = load_trained(config, saved, device), build_seeded_method(config, device)
    towers = {"trained": trained.export()["backbone"].eval(), "untrained": untrained.export()["backbone"].eval()}
    start, missing = _start(config, device)
    towers |= start
    gallery = Gallery(config, inputs, towers, config.evaluation.knn.image_size or trained.views[0].size, device)
    scores, step = _scores(directory, history, saved)
    own = _facts(config, history, saved, sum(p.numel() for p in towers["trained"].parameters()))
    own |= missing
    own |= {name: value for name, value in (facts or {}).items() if not name.startswith("k-NN")}
    page.write(
        out,
        "run",
        title=f"fovea: {config.run.name}",
        method=config.method.name,
        run=config.run.name,
        seen=number(step * config.train.global_batch_size),
        queries=gallery.split,
        **_result(scores),
        facts=own,
        **_curves(config, history, scores),
        samples=preview.gather(config, inputs, trained.views, CROPS),
        legend=preview.legend(trained.views),
        patches=_patches(gallery),
        neighbours=_neighbours(gallery, min(config.evaluation.knn.max_train or _BANK, _BANK)),
        width=_THUMB // 2,
        checkpoint=saved.path.name,
        torch=str(torch.__version__),
    )
    return out


def _start(config: Config, device: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The tower that an adapted run began with, and the reason why it is not shown."""
    from pipeline.weights.interpolate import start_tower

    if config.init_from.source is None or config.model.timm_name is not None:
        return {}, {}
    try:
        return {"start": start_tower(config).to(device)}, {}
    except FoveaError as error:
        return {}, {"start not shown": error.what}


# ---- scores and facts ---------------------------------------------------------------------------------------------------


def _scores(run: RunDirectory, history: History, saved: Saved) -> tuple[dict[str, dict[int, float]], int]:
    """The newest k-NN of the journals and its step; or that of ``fovea eval`` if it evaluated a later checkpoint."""
    values = {name: points[max(points)] for name, points in history.metrics.items() if points and _is_knn(name)}
    step = max((max(history.metrics[name]) for name in values), default=-1)
    if step < saved.step and (result := read_all(run).get(saved.path.name)) is not None:
        evaluated = {name: value for name, value in result.scores.items() if _is_knn(name)}
        values, step = (evaluated, saved.step) if evaluated else (values, step)
    scores: dict[str, dict[int, float]] = {name: {} for name in _NETWORKS}
    for name, value in values.items():
        baseline, metric = split_metric(name)
        scores.setdefault(baseline or "trained", {})[int(metric.removeprefix("knn/k"))] = value
    return scores, step if step >= 0 else saved.step


def _is_knn(name: str) -> bool:
    return re.fullmatch(r"knn/k[0-9]{1,9}", split_metric(name)[1]) is not None


def _facts(config: Config, history: History, saved: Saved, weights: int) -> dict[str, str]:
    manifest, seen = saved.manifest, saved.step * config.train.global_batch_size
    data, seconds = manifest.get("data", {}), float(manifest.get("seconds", 0.0))
    bad = {str(reason): int(count) for reason, count in data.get("substituted", {}).items()}
    reasons = f" ({', '.join(f'{count} {reason}' for reason, count in bad.items())})" if bad else ""
    return {
        "images per second, training alone": number(seen / seconds) if seconds else "unknown",
        "samples seen": number(seen),
        "epochs": f"{seen / data['samples']:.1f}" if data.get("samples") else "unknown",
        "optimizer steps": number(saved.step),
        "attempts": f"{max(history.attempts, 1)}",
        "steps skipped as not finite": str(manifest.get("skipped", 0)),
        "samples substituted": f"{sum(bad.values())}{reasons}",
        "time spent training": clock(seconds),
        "weights of the backbone": f"{weights / 1e6:.2f} M",
        "ranks": str(manifest.get("world", 1)),
    }


def _result(scores: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Variables of the headline and of the table."""
    ks = sorted({k for row in scores.values() for k in row})
    rows = [
        {
            "name": name,
            "best": source == "trained",
            "cells": [percent(scores[source][k]) if k in scores[source] else "unknown" for k in ks],
            "width": 100 * scores[source].get(ks[-1], 0.0) if ks else 0.0,
        }
        for source, name in _NETWORKS.items()
        if scores[source]
    ]
    headline = None
    if scores["trained"]:
        k = max(scores["trained"])
        others = [source for source in _NETWORKS if source != "trained" and k in scores[source]]
        baselines = {_NETWORKS[source]: scores[source][k] for source in others}
        headline = {"trained": scores["trained"][k], "baselines": baselines}
    return {"headline": headline, "ks": ks, "scores": rows}


# ---- curves -------------------------------------------------------------------------------------------------------------


def _curves(config: Config, history: History, scores: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Variables of both figures of curves."""
    batch = config.train.global_batch_size
    marks = [(step * batch, text) for step, text in sorted(history.resumes.items())]
    k = max(scores["trained"], default=0)
    names = {"random_init": ("random init", 1), "init_from": ("initial weights", 1), "pixels": ("raw pixels", 2)}
    levels = [(name, scores[source][k], colour) for source, (name, colour) in names.items() if k in scores[source]]
    trained = Line("trained", history.line(f"knn/k{k}", batch), dots=True)

    def panel(title: str, metric: str, *, floor: float | None = None, share: bool = False) -> Chart:
        low, high = (0.0, 1.02) if share else (floor, None)
        line = Line(title, history.line(metric, batch))
        return Chart(title, [line], marks=marks, floor=low, ceiling=high, width=250, height=160)

    terms = [name.removeprefix("train/") for name in history.metrics if name.startswith("train/")]
    terms = [name for name in terms if name not in _SCHEDULES]
    terms.sort(key=lambda name: (list(_TITLES).index(name) if name in _TITLES else len(_TITLES), name))
    return {
        "knn": Chart(f"k-NN accuracy, k = {k}", [trained], levels=levels, marks=marks, percent=True, floor=0.0),
        "loss": Chart("loss, sum of its terms (nats)", [Line("loss", history.line("train/loss", batch))], marks=marks),
        "panels": [
            *(panel(_TITLES.get(name, name), f"train/{name}", share=name in _SHARES) for name in terms[:6]),
            panel("learning rate", "train/lr", floor=0.0),
            panel("images per second", "perf/images_per_second", floor=0.0),
        ],
        "resumes": bool(marks),
    }


# ---- features -----------------------------------------------------------------------------------------------------------


def _patches(gallery: Gallery) -> dict[str, Any]:
    """Variables of the figure of principal components: a row of images, and one of each network."""
    import torch

    size = scaled(gallery.size, 2)
    views, captions = gallery.images(gallery.queries, varied(gallery.queries, PCA), size)
    about = f"{size} pixels a side" if isinstance(size, int) else f"{size_text(size)} pixels"
    rows = [_row("image", about, [images.pixels(view) for view in views], captions)]
    for name, tower in gallery.towers.items():
        with torch.inference_mode():
            tokens = torch.cat([tower(part).patches for part in views.split(8)])
        grid = grid_of(size, tower.patch, tokens.shape[1])
        colours, share = principal(tokens)
        maps = np.rint(255 * colours).astype(np.uint8).reshape(len(views), *grid, -1)
        rows.append(_row(name, f"{100 * share:.0f} % of the variance", list(maps), captions))
    return {"rows": rows, "grid": size_text(grid), "count": len(views)}


def _row(title: str, note: str, tiles: Sequence[images.Pixels], captions: Sequence[str]) -> dict[str, Any]:
    described = [(_thumbnail(tile), f"{title}: {caption}") for tile, caption in zip(tiles, captions, strict=True)]
    return {"title": title, "note": note, "images": described, "width": _THUMB // 2, "sharp": True}


def _thumbnail(tile: images.Pixels) -> Image.Image:
    return images.fitted(tile, min(_THUMB, max(tile.shape)))  # small images are enlarged by the browser


def _neighbours(gallery: Gallery, most: int) -> dict[str, Any]:
    """Variables of the figure of nearest neighbours; at most ``most`` images are searched."""
    import torch

    from pipeline.data.order.random import choose

    ids = gallery.bank.ids(choose(gallery.bank.total, most, 0, _DRAW))
    query_ids = varied(gallery.queries, QUERIES)
    keys, key_labels = gallery.classes(gallery.bank, ids)
    queries, query_labels = gallery.classes(gallery.queries, query_ids)
    similarity = queries @ keys.T
    if gallery.bank is gallery.queries:  # an image is not its own neighbour
        similarity[torch.from_numpy(query_ids[:, None] == ids[None])] = -2.0
    cosines, nearest = similarity.topk(min(NEIGHBOURS, len(ids)), dim=1)
    query_views, query_captions = gallery.images(gallery.queries, query_ids, gallery.size)
    views, captions = gallery.images(gallery.bank, ids[nearest.flatten().numpy()], gallery.size)
    rows: list[dict[str, Any]] = []
    same = labelled = 0
    for row, label in enumerate(query_labels):
        hits = []
        for column in range(nearest.shape[1]):
            view, other = row * nearest.shape[1] + column, key_labels[int(nearest[row, column])]
            kind = "" if label < 0 or other < 0 else "same" if other == label else "other"
            labelled, same = labelled + (kind != ""), same + (kind == "same")
            about = f"class {other}: {captions[view]}"
            image = _thumbnail(images.pixels(views[view]))
            hits.append({"image": image, "about": about, "kind": kind, "cosine": float(cosines[row, column])})
        name = f"class {label}" if label >= 0 else "no class"
        query = _thumbnail(images.pixels(query_views[row]))
        rows.append({"image": query, "caption": query_captions[row], "label": name, "hits": hits})
    return {"rows": rows, "count": nearest.shape[1], "searched": len(ids), "labelled": labelled, "same": same}
