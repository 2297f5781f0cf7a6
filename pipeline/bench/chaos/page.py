"""The page of the chaos benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pipeline.bench.chaos.catalogue import catalogue
from pipeline.bench.chaos.records import Row
from pipeline.bench.chaos.statistics import Summary, at_least, goodput, summarize
from pipeline.masking import printable

_CONTROLS = ("none", "slurm-none")
_RATES = ((600.0, "ten minutes"), (3600.0, "hour"))


def faults(rows: Sequence[Row]) -> list[Row]:
    """The rows without controls."""
    return [row for row in rows if row.kind not in _CONTROLS]


def line(row: Row) -> str:
    """One fault in a line."""
    end = "equal" if row.equal else f"NOT EQUAL ({row.error or 'other bits'})"
    did = row.action or "nothing"
    return (
        f"{row.kind} {row.number}: {row.detail} at step {row.step}; {end}; {row.steps_lost} steps and {row.seconds_lost:.1f} s "
        f"lost; user: {did}"
    )


def markdown(rows: Sequence[Row], machine: dict[str, str], command: str) -> str:
    """Render the page; titles come from the catalogue of kinds, rows of unknown kinds are left out."""
    table = catalogue()
    rows = [row for row in rows if row.kind in table]
    own = faults(rows)
    summaries = summarize(sorted(rows, key=lambda row: list(table).index(row.kind)))
    equal, ended = sum(row.equal for row in own), sum(row.ended for row in own)
    seeds, kinds = sorted({row.seed for row in rows}), len({row.kind for row in own})
    lines = ["# Chaos: runs under faults", "", f"`{command}`", "", *(f"- {n}: {v}" for n, v in machine.items())]
    lines += [
        "- DINOv2 on synthetic scenes, toy size, 2 ranks on the CPU, 32 steps of 16 samples (80 on Slurm), a checkpoint every 5",
        f"- {len(own)} faults of {kinds} kind{'s' * (kinds != 1)}, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}, each in a run of its own, at a random moment",
        "",
    ]
    if own:
        lines += [
            f"**{ended} of {len(own)} runs came to their end, {equal} with the bits of an undisturbed run** (weights, optimizer "
            f"state and teacher of the last checkpoint, and the signatures of all steps of all attempts): with 95 % confidence "
            f"at least {100 * at_least(equal, len(own)):.1f} % of such runs. Samples lost or doubled: "
            f"{sum(row.samples_wrong for row in own)}.",
            "",
        ]
    lines += [
        "| fault | n | ended | bit-equal | steps executed again, median (most) | seconds lost, median (95 %) | the user did |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    lines += [_row(table[kind].title, one) for kind, one in summaries.items()]
    if own:
        lines += ["", *_goodput(own)]
    lines += ["", *_notes(rows)]
    if unequal := [row for row in own if not row.equal]:
        lines += ["", "## Not equal, or not ended", ""]
        lines += [f"- {printable(line(row)).replace('`', '')}" for row in unequal]
    return "\n".join(lines) + "\n"


def _row(title: str, one: Summary) -> str:
    did = "; ".join(
        f"{action or 'nothing'}{f' ({count})' if len(one.actions) > 1 else ''}" for action, count in sorted(one.actions.items())
    )
    median, most = one.steps
    seconds, late = one.seconds
    counts = f"{one.count} | {one.ended} | {one.equal}"
    return f"| {title} | {counts} | {median:g} ({most}) | {seconds:.1f} ({late:.1f}) | {printable(did)} |"


def _goodput(own: Sequence[Row]) -> list[str]:
    lines = ["| one fault every | goodput | 95 % interval |", "|---|---:|---|"]
    for seconds, name in _RATES:
        share = goodput(own, seconds)
        lines.append(f"| {name} | {100 * share.mean:.1f} % | {100 * share.low:.1f} to {100 * share.high:.1f} % |")
    lines += [
        "",
        "Goodput is computed, not measured: 24 hours of training are played 500 times, with faults at exponential distances, all "
        "kinds equally often; each costs the seconds of a measured fault, drawn with replacement. It holds for this toy run on "
        "this machine: a real run starts more slowly and has longer steps, of which more are lost (`fovea bench failures`).",
    ]
    return lines


def _notes(rows: Sequence[Row]) -> list[str]:
    starts, steps = [row.start for row in rows if row.start], [row.usual for row in rows if row.usual]
    notes = [
        "- *Seconds lost*: from the fault on, time in which no step was completed for the first time, where it exceeds five "
        "usual steps, less the usual time of these steps. It contains detection, the start of the next attempt and steps "
        "executed again. The controls show what the noise of the machine alone makes of it. The user types at once.",
        "- *The user did*: what was needed beyond waiting. On Slurm runs continue by themselves; `scancel` ends a run "
        "on purpose.",
        "- *Samples lost or doubled*: samples of steps whose global batch, by its signature, is not that of the undisturbed run.",
        "- Slurm, S3 (moto, through a proxy that misbehaves) and MLflow are real servers, as in the tests. Ranks are forked from "
        "a process that has imported everything, so that a start takes less than that of a new process; a wall clock "
        "is set by a library loaded before libc, for the processes of the run alone, which are new ones. "
        "The time limit is the signal that Slurm sends before it; a lost node is one that an administrator declares down. Jobs "
        "run the copied code in new processes.",
        "- For a stopped rank `watchdog.hang_floor=3` and `hang_factor=5` were set; by default that takes five minutes.",
    ]
    if starts and steps:
        notes.append(
            f"- Medians on this machine, busy with other work: {statistics.median(starts):.1f} s from an attempt's start to its "
            f"first step, {statistics.median(steps):.2f} s a step."
        )
    return notes
