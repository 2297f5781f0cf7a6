"""Generates the README's benchmark table from the results kept in this package."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
_MEGABYTE = 1e6

Document = Mapping[str, Any]
Row = tuple[str, str, str, str]  # what, ours, baseline, ratio


def table(results: Path = RESULTS) -> str:
    """Markdown rows of all kept results, in a fixed order."""
    lines = ["| what (machine and command: the linked page) | fovea | against | ratio |", "|---|---:|---:|---:|"]
    for name, rows in _READERS.items():
        path = results / f"{name}.json"
        if path.is_file():
            document = json.loads(path.read_text())
            page = f"pipeline/bench/results/{name.removesuffix('-20').removesuffix('-77')}.md"
            lines += [f"| [{what}]({page}) | {ours} | {against} | {ratio} |" for what, ours, against, ratio in rows(document)]
    return "\n".join(lines) + "\n"


def written(readme: str, results: Path = RESULTS) -> str:
    """The README text with the table inserted between its two markers.

    Raises:
        ValueError: a marker is missing.
    """
    begin, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return f"{readme[:begin]}\n{table(results)}{readme[end:]}"


def _data(d: Document) -> list[Row]:
    best = {name: min(values) for name, values in d["milliseconds"].items()}
    ours, theirs = best["fovea, hue yiq"], best["torchvision v2, hue"]
    return [
        ("ten views of a picture, CPU", f"{ours:.1f} ms", f"{theirs:.1f} ms torchvision v2", f"{theirs / ours:.2f} x cheaper")
    ]


def _step(caption: int) -> Callable[[Document], list[Row]]:
    def rows(d: Document) -> list[Row]:
        ours, theirs = (min(d["cases"][name]["seconds"]) for name in ("fovea", "open_clip"))
        what = f"CLIP B/32 step, captions of {caption} tokens"
        return [(what, f"{ours:.2f} s", f"{theirs:.2f} s open_clip", f"{theirs / ours:.2f} x faster")]

    return rows


def _dinov2(d: Document) -> list[Row]:
    ours, theirs = (min(d["cases"][name]["seconds"]) for name in ("fovea", "official"))
    return [("DINOv2 ViT-S/14 step", f"{ours:.2f} s", f"{theirs:.2f} s official code", f"{theirs / ours:.2f} x faster")]


def _heads(d: Document) -> list[Row]:
    ours, plain = d["cases"]["in pieces"], d["cases"]["whole logits"]
    time = min(plain["seconds"]) / min(ours["seconds"])
    memory = plain["peak"] / ours["peak"]
    sizes = [f"{case['peak'] / _MEGABYTE:,.0f} MB, {min(case['seconds']):.1f} s" for case in (ours, plain)]
    return [("prototype losses", sizes[0], f"{sizes[1]} whole logits", f"{memory:.1f} x less memory, {time:.2f} x the speed")]


def _checkpoint(d: Document) -> list[Row]:
    ours, waiting = d["beside"] / d["step"], d["waiting"] / d["step"]
    row = ("training stands still for a checkpoint", f"{ours:.1%} of a step", f"{waiting:.1%} waiting for it")
    return [(*row, f"{waiting / ours:.0f} x less")]


def _resume(d: Document) -> list[Row]:
    fresh, resumed = min(d["fresh"]), min(d["resumed"])
    row = (
        "first step from a checkpoint, verified",
        f"{resumed:.2f} s",
        f"{fresh:.2f} s afresh",
        f"{resumed / fresh:.2f} x as long",
    )
    return [row]


def _loop(d: Document) -> list[Row]:
    trainer, engine = (statistics.median(d[name]) * 1e3 for name in ("trainer", "engine"))
    row = ("the training loop, CPU of a step", f"{trainer:.2f} ms", f"{engine:.2f} ms the engine alone")
    return [(*row, f"{trainer - engine:.2f} ms more")]


def _determinism(d: Document) -> list[Row]:
    strict, normal = (min(d["cases"][name]["seconds"]) for name in ("deterministic", "normal"))
    return [("deterministic mode", f"{strict:.2f} s", f"{normal:.2f} s normal", f"{strict / normal:.2f} x as long")]


_READERS: dict[str, Callable[[Document], list[Row]]] = {
    "data-cpu": _data,
    "step-clip-cpu-20": _step(20),
    "step-clip-cpu-77": _step(77),
    "step-dinov2-cpu": _dinov2,
    "heads-cpu": _heads,
    "checkpoint-cpu": _checkpoint,
    "resume-cpu": _resume,
    "loop-cpu": _loop,
    "determinism-cpu": _determinism,
}
