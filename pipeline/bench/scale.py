"""Growth of the costs of an index with shards and samples, as curves with their exponents.

Each figure is measured in a process of its own by :mod:`pipeline.bench.scale_probe`, if wanted also with an earlier checkout of
fovea in the same run. CPU time, bytes and memory are figures of this machine; exponents carry over.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.bench.probes import run_probe
from pipeline.bench.streams import Compared, Default, Mixing, Shape
from pipeline.bench.streams import markdown as streams_markdown
from pipeline.errors import ConfigError
from pipeline.runtime.interpreter import ROOT

_PROBE = Path(__file__).with_name("scale_probe.py")
_LIMIT = 3600.0  # seconds for one measurement


@dataclass(frozen=True)
class Options:
    """Sizes to measure.

    Attributes:
        shards: numbers of shards with sidecars, each of ``rows`` samples.
        rows: samples per shard.
        tables: numbers of shards in a manifest without sidecars.
        samples: numbers of samples to choose from.
        drawn: how many are chosen.
        live: numbers of shards of 1000 samples that are read in random order.
        checkpoints: numbers of checkpoints that are listed.
        steps: lengths of runs whose curves are read, in 1000 attempts (or as many as there are records).
        streams: numbers of streams for which downloads and shuffling are measured.
        shape: the set of which they are streams.
        scenes: images of a set whose index is estimated and made.
        before: checkout of an earlier version to measure too.
        most_before: largest number of shards in a manifest, and of samples to choose from, for the earlier version.
    """

    shards: tuple[int, ...] = (30, 100, 300, 1000)
    rows: int = 10_000
    tables: tuple[int, ...] = (1000, 10_000, 100_000, 500_000)
    samples: tuple[int, ...] = (100_000, 1_000_000, 10_000_000, 5_000_000_000)
    drawn: int = 50_000
    live: tuple[int, ...] = (200, 1000, 2000)
    checkpoints: tuple[int, ...] = (100, 1000, 10_000)
    steps: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    streams: tuple[int, ...] = (256, 128, 64, 32, 16, 8, 4)
    shape: Shape = field(default_factory=Shape)
    scenes: int = 12_000
    before: Path | None = None
    most_before: tuple[int, int] = (500_000, 10_000_000)

    @classmethod
    def smoke(cls) -> Options:
        """Sizes of a test."""
        small = Shape(200, 100, 64, 128)
        return cls((2, 4), 20, (10, 100), (100, 1000), 10, (2, 4), (1, 3), (100, 1000), (16, 4), small, 200)


@dataclass
class Curve:
    """One cost at several sizes.

    Attributes:
        name: what is measured.
        unit: of the size.
        figure: of the cost: ``s``, ``bytes`` or ``µs``.
        now, before: cost by size.
    """

    name: str
    unit: str
    figure: str
    now: dict[int, float] = field(default_factory=dict)
    before: dict[int, float] = field(default_factory=dict)


def exponent(points: Mapping[int, float]) -> float:
    """Exponent of the power law fitted by least squares on logarithms; NaN for fewer than two points."""
    pairs = [(math.log(size), math.log(max(cost, 1e-6))) for size, cost in points.items() if size > 0]
    if len(pairs) < 2:
        return math.nan
    x, y = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return sum((a - x) * (b - y) for a, b in pairs) / sum((a - x) ** 2 for a, _ in pairs)


def measure(options: Options, *, log: Callable[[str], None]) -> list[Curve]:
    """Measure all curves.

    Args:
        options: the sizes.
        log: called with each figure.

    Raises:
        ConfigError: a measurement failed.
    """
    curves: dict[tuple[str, str], Curve] = {}

    def add(curve: Curve, size: int, now: float, version: str) -> None:
        known = curves.setdefault((curve.name, curve.figure), curve)
        (known.before if version == "before" else known.now)[size] = now
        log(f"{version:6} {curve.name}: {size} {curve.unit}: {_shown(now, curve.figure)}")

    versions = {"now": ROOT, **({"before": options.before} if options.before else {})}
    with tempfile.TemporaryDirectory(prefix="fovea-scale-") as folder:
        for version, root in versions.items():
            for shards in options.shards:
                sizes = {"folder": f"{folder}/large", "shards": shards, "rows": options.rows}
                _probe(root, "make", sizes)
                for first, who in ((True, "the process that asks for the shards"), (False, "each other rank")):
                    cost = _probe(root, "start", {**sizes, "first": first})
                    name = f"finished index to the first batch, {who}"
                    add(Curve(name, f"shards of {options.rows}", "s"), shards, cost["cpu"], version)
                    add(Curve(name, f"shards of {options.rows}", "bytes"), shards, cost["read"], version)
            for shards in options.tables:
                if version == "before" and shards > options.most_before[0]:
                    continue
                cost = _probe(root, "manifest", {"folder": folder, "shards": shards})
                for key, name in (("save", "manifest saved"), ("load", "manifest loaded"), ("fingerprint", "fingerprint")):
                    add(Curve(name, "shards", "s"), shards, cost[key], version)
                add(Curve("sent to each data worker", "shards", "bytes"), shards, cost["sent"], version)
                cost = _probe(root, "loaded", {"folder": folder, "shards": shards})
                add(Curve("memory of a process with a manifest", "shards", "bytes"), shards, cost["held"], version)
            for samples in options.samples:
                if version == "before" and samples > options.most_before[1]:
                    continue
                cost = _probe(root, "choose", {"samples": samples, "drawn": options.drawn})
                name = f"{options.drawn} samples chosen for an evaluation"
                add(Curve(name, "samples", "s"), samples, cost["cpu"], version)
                add(Curve(f"{name}: peak of the process", "samples", "bytes"), samples, cost["peak"], version)
            for live in options.live:
                sizes = {"folder": f"{folder}/small", "shards": live, "rows": 1000}
                _probe(root, "make", sizes)
                cost = _probe(root, "reader", {"folder": f"{folder}/small", "live": live, "rows": 1000, "fetched": 2000})
                add(Curve("one sample read", "shards of 1000 in use", "µs"), live, cost["cpu"] / 2000 * 1e6, version)
            for count in options.checkpoints:
                cost = _probe(root, "checkpoints", {"folder": folder, "count": count})
                add(Curve("fovea checkpoint list", "checkpoints", "s"), count, cost["cpu"], version)
            for steps in options.steps:
                cost = _probe(root, "history", {"folder": folder, "steps": steps, "attempts": min(1000, steps // 10)})
                add(Curve("curves of a run of 1000 attempts read for a report", "steps", "s"), steps, cost["cpu"], version)
    return list(curves.values())


def _probe(root: Path, name: str, options: Mapping[str, Any], limit: float = _LIMIT) -> dict[str, float]:
    if "folder" in options:
        Path(str(options["folder"])).mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    argv, what = [sys.executable, "-P", str(_PROBE), name, json.dumps(options)], f"the measurement {name} of {root}"
    done = run_probe(argv, environment, limit=limit, what=what, where="bench scale")
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"{what} failed ({last})", where="bench scale", hint="See the message")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def markdown(
    curves: Sequence[Curve],
    options: Options,
    machine: Mapping[str, str],
    command: str,
    *,
    rows: Sequence[Mixing] = (),
    estimates: Sequence[Compared] = (),
    chosen: Sequence[Default] = (),
) -> str:
    """Render the page: a table for each cost, with the exponents; streams and estimates."""
    lines = [
        "# How costs of an index grow",
        "",
        f"`{command}`",
        "",
        *(f"- {name}: {value}" for name, value in machine.items()),
        "",
    ]
    lines += ["CPU seconds of the process; bytes are what it read, what it sent, or memory. One measurement each.", ""]
    if options.before:
        lines += ["*Before* is an earlier checkout, measured in the same run.", ""]
    for curve in curves:
        both = bool(curve.before)
        lines += [f"## {curve.name[0].upper()}{curve.name[1:]}, {curve.figure}", ""]
        lines += [f"| {curve.unit} | {'before | ' if both else ''}now |", f"|---:|{'---:|' if both else ''}---:|"]
        for size, now in curve.now.items():
            old = f"{_shown(curve.before[size], curve.figure)} | " if size in curve.before else "not measured | " if both else ""
            lines.append(f"| {size:,} | {old}{_shown(now, curve.figure)} |")
        old = f"{exponent(curve.before):.2f} | " if both else ""
        lines += [f"| exponent | {old}{exponent(curve.now):.2f} |", ""]
    if rows:
        lines += streams_markdown(rows, estimates, chosen, options.shape)
    return "\n".join(lines)


def _shown(value: float, figure: str) -> str:
    if figure == "bytes":
        return f"{value / 1e6:,.2f} MB" if value >= 1e4 else f"{value:,.0f} B"
    return f"{value:,.0f} µs" if figure == "µs" else f"{value:.3f} s"
