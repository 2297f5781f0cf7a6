"""Simulates failing runs on 1 to 2048 nodes: goodput and lost steps by the interval of checkpoints, with and without snapshots.

Nothing is measured here: costs are given. Where the simulation has a closed form, the page shows both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from pipeline.estimate.failures import (
    ASSUMED,
    NODE_MTBF_HOURS,
    Costs,
    DoesNotAdvance,
    Simulated,
    daly,
    expected_goodput,
    mtbf,
    optimum,
    simulate,
    young,
)

NODES = tuple(2**power for power in range(12))
_DEFAULT_STEPS = 3750  # checkpoint.every of a config that does not set it
_MOST_EVENTS, _MOST_FAILURES = 50_000, 1000  # savepoints and mean lives of a run, so that no option takes hours
_STILL = "does not advance"
_COLOURS = ("#0072b2", "#b84f00", "#007f5c", "#6b6b6b")


@dataclass(frozen=True)
class Options:
    """What is assumed.

    Attributes:
        node_hours: mean hours between two failures of a node.
        step: seconds of a step, whatever the number of nodes.
        costs: of checkpoints, snapshots and failures.
        runs: simulated runs of each point, of which mean and interval count.
        days: useful work of a run; less where that is more than 50,000 savepoints, or a thousand times the mean time between
            failures.
    """

    node_hours: float = NODE_MTBF_HOURS
    step: float = 1.0
    costs: Costs = ASSUMED
    runs: int = 40
    days: float = 30.0


@dataclass(frozen=True)
class Point:
    """Results for a number of nodes; intervals in seconds.

    Attributes:
        nodes: number of nodes.
        failures: expected failures a day.
        young, daly, best: intervals.
        formula, formula_repaired: expected goodput at the best interval, without and with snapshots.
        written, repaired: the same simulated, mean and half width of its 95 % interval; 0 of a run that does not advance.
        default: as ``written``, at the interval that configs have by default.
        lost, lost_repaired: steps lost to a failure, mean, as ``written`` and as ``repaired``; ``None`` of a run that does not
            advance.
    """

    nodes: int
    failures: float
    young: float
    daly: float
    best: float
    formula: float
    formula_repaired: float
    written: tuple[float, float]
    repaired: tuple[float, float]
    default: tuple[float, float]
    lost: float | None
    lost_repaired: float | None


def measure(options: Options, nodes: Sequence[int] = NODES, *, log: Callable[[str], None] = lambda _: None) -> list[Point]:
    """Simulate each number of nodes."""
    points = []
    for count in nodes:
        points.append(_point(options, count))
        log(f"{count} nodes")
    return points


def _point(options: Options, nodes: int) -> Point:
    costs, between = options.costs, mtbf(nodes, options.node_hours)
    best = max(optimum(costs.plain, between), options.step)
    runs = {
        name: _runs(options, case, interval, between, f"{nodes}/{name}")
        for name, case, interval in (
            ("written", costs.plain, best),
            ("repaired", costs, best),
            ("default", costs.plain, max(_DEFAULT_STEPS * options.step, costs.write)),
        )
    }
    return Point(
        nodes,
        86400 / between,
        young(costs.pause, between),
        daly(costs.pause, between),
        best,
        expected_goodput(best, costs.plain, between),
        expected_goodput(best, costs, between),
        **{name: _interval([one.goodput for one in own]) for name, own in runs.items()},
        lost=_lost(runs["written"], options.step),
        lost_repaired=_lost(runs["repaired"], options.step),
    )


def _runs(options: Options, costs: Costs, interval: float, between: float, seed: str) -> list[Simulated]:
    """Simulated runs; none if one of them does not advance."""
    shortest = min(interval, costs.snapshot_every or interval)
    work = min(options.days * 86400, _MOST_EVENTS * shortest, _MOST_FAILURES * between)
    try:
        return [simulate(costs, interval, between, work, Random(f"{seed}/{n}")) for n in range(options.runs)]
    except DoesNotAdvance:
        return []


def _interval(values: Sequence[float]) -> tuple[float, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return (statistics.mean(values), 1.96 * spread / math.sqrt(len(values))) if values else (0.0, 0.0)


def _lost(runs: Sequence[Simulated], step: float) -> float | None:
    return sum(one.lost for one in runs) / max(sum(one.failures for one in runs), 1) / step if runs else None


def markdown(points: Sequence[Point], options: Options, figure: str, machine: dict[str, str], command: str) -> str:
    """Render the page.

    Args:
        points: results.
        options: what they assume.
        figure: file name of the figure, beside the page.
        machine: its description.
        command: command line.
    """
    costs = options.costs
    lines = ["# Failing runs, simulated", "", f"`{command}`", "", *(f"- {n}: {v}" for n, v in machine.items())]
    lines += [
        f"- assumed: {options.node_hours:,.0f} hours between failures of a node; steps of {options.step:g} s; a checkpoint "
        f"pauses training {costs.pause:g} s and is complete {costs.write:g} s later; "
        f"{costs.restart:g} s from a failure to the next step",
        f"- with snapshots: one every {costs.snapshot_every:g} s in host memory, a pause of {costs.snapshot_pause:g} s; they "
        f"repair {100 * costs.repairable:g} % of the failures inside the job, in {costs.repair:g} s",
        f"- {options.runs} runs of {options.days:g} days of work for each number (or of {_MOST_EVENTS:,} savepoints or "
        f"{_MOST_FAILURES:,} times the mean time between failures, if that is less); ± is the 95 % interval of the mean",
        "",
        "These costs are assumptions, not measurements of such clusters; set your own with the options of the command.",
        "",
        f"![Goodput by number of nodes]({figure})",
        "",
        "| nodes | failures a day | interval: Young | Daly | best | goodput, formula | simulated | with snapshots, formula | "
        "simulated | checkpoint.every by default | steps lost a failure | with snapshots |",
        "|" + "---:|" * 12,
    ]
    for point in points:
        intervals = " | ".join(_time(value) for value in (point.young, point.daly, point.best))
        lost = " | ".join("-" if value is None else f"{value:.0f}" for value in (point.lost, point.lost_repaired))
        lines.append(
            f"| {point.nodes} | {point.failures:.3g} | {intervals} | {100 * point.formula:.2f} % | {_share(point.written)} | "
            f"{100 * point.formula_repaired:.2f} % | {_share(point.repaired)} | {_share(point.default)} | {lost} |"
        )
    if any(value == (0.0, 0.0) for point in points for value in (point.written, point.repaired, point.default)):
        lines += ["", f"“{_STILL.capitalize()}”: in one run or more, less than one percent of the time counts."]
    lines += [
        "",
        'Young, "A first order approximation to the optimum checkpoint interval" (1974): sqrt(2 pause M) with the mean time M '
        'between failures of the run. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" '
        "(2006); the formula is its equation 20, in which the time that a checkpoint is written in the background counts as part "
        "of the restart: a failure loses half an interval and an unfinished write. The best interval maximizes it, and is never "
        "shorter than a write. The formula with snapshots is an approximation, at the same interval. By default configs save "
        "every 3,750 steps.",
    ]
    return "\n".join(lines) + "\n"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _share(value: tuple[float, float]) -> str:
    return _STILL if value == (0.0, 0.0) else f"{100 * value[0]:.2f} ± {100 * value[1]:.2f} %"


def figure(points: Sequence[Point]) -> str:
    """Goodput by number of nodes, as an SVG file."""
    width, height, left, right, top, bottom = 640, 340, 56, 430, 30, 290
    curves: list[tuple[str, list[float]]] = [
        ("with snapshots", [point.repaired[0] for point in points]),
        ("best interval", [point.written[0] for point in points]),
        ("its formula", [point.formula for point in points]),
        ("every 3,750 steps", [point.default[0] for point in points]),
    ]
    low = min(math.floor(10 * min(min(values) for _, values in curves)), 9) / 10
    last = math.log2(points[-1].nodes) or 1.0

    def x(nodes: int) -> float:
        return left + (right - left) * math.log2(nodes) / last

    def y(share: float) -> float:
        return bottom - (bottom - top) * (share - low) / (1 - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{left}" y="18" font-weight="bold">Goodput by number of nodes</text>',
        f'<text x="{right}" y="{height - 10}" text-anchor="end">nodes</text>',
    ]
    for tick in range(round(10 * low), 11, 1 if low > 0.4 else 2):
        height_of = y(tick / 10)
        parts.append(f'<path d="M{left} {height_of:.1f}H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{height_of + 4:.1f}" text-anchor="end">{10 * tick} %</text>')
    parts += [
        f'<text x="{x(point.nodes):.1f}" y="{bottom + 16}" text-anchor="middle">{point.nodes}</text>'
        for point in points[:: max(len(points) // 6, 1)]
    ]
    labels = _apart([y(values[-1]) for _, values in curves])
    for (name, values), label, colour in zip(curves, labels, _COLOURS, strict=True):
        path = " ".join(f"{x(point.nodes):.1f},{y(value):.1f}" for point, value in zip(points, values, strict=True))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{right + 8}" y="{label + 4:.1f}" fill="{colour}">{name} {100 * values[-1]:.1f} %</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _apart(places: Sequence[float], distance: float = 15.0) -> list[float]:
    """Places of labels, moved so far down that none covers another."""
    moved = list(places)
    previous = -math.inf
    for index in sorted(range(len(places)), key=places.__getitem__):
        previous = moved[index] = max(places[index], previous + distance)
    return moved
