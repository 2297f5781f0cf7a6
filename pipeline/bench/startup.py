"""The start of a run: CPU and wall time from ``fovea train`` to the end of the first step, and where they are spent.

Real runs of a tiny SimCLR model, by number of shards and ranks, with a finished index and without one; if wanted also with an
earlier checkout, in turns. What a start asks of an S3 server is counted by :mod:`pipeline.bench.startup_s3`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.bench.probes import run_probe
from pipeline.bench.startup_runs import SAMPLES, settings, write_shards
from pipeline.bench.startup_s3 import Counts
from pipeline.bench.startup_s3 import markdown as s3_markdown
from pipeline.bench.startup_s3 import measure as measure_s3
from pipeline.errors import ConfigError
from pipeline.runtime.interpreter import ROOT
from pipeline.runtime.startup_phases import FILE

_PROBE = Path(__file__).with_name("startup_probe.py")
_WHERE = "bench startup"


@dataclass(frozen=True)
class Options:
    """Sizes to measure.

    Attributes:
        shards: numbers of shards, of 24 samples each.
        ranks: numbers of ranks.
        rounds: starts of each kind, of which the smallest counts.
        before: checkout of an earlier version to measure too.
        before_ranks: numbers of ranks of the earlier version.
        s3_shards: numbers of shards in the bucket.
        limit: seconds for one start.
        minutes: no further start is begun after so many minutes; ``None`` for no such limit.
    """

    shards: tuple[int, ...] = (1, 100, 1000)
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 2
    before: Path | None = None
    before_ranks: tuple[int, ...] = (1, 2, 4, 8)
    s3_shards: tuple[int, ...] = (4, 64, 128)
    limit: float = 900.0
    minutes: float | None = None

    @classmethod
    def smoke(cls) -> Options:
        """Sizes of a test."""
        return cls((2,), (1, 2), 1, s3_shards=(4,))


@dataclass
class Start:
    """Starts of one kind.

    Attributes:
        version: ``now`` or ``before``.
        shards, ranks: sizes.
        index: whether the index was finished.
        cpu: CPU seconds of all processes until the first step had ended, by round.
        wall: seconds until then, by round.
        total: CPU seconds of the whole command of two steps, by round.
        phases: marks of the launcher and rank 0 in the round with the least CPU time.
    """

    version: str
    shards: int
    ranks: int
    index: bool
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Result:
    """All starts; what the S3 server counted, or why it did not."""

    starts: list[Start] = field(default_factory=list)
    s3: list[Counts] = field(default_factory=list)
    no_s3: str = ""


def measure(options: Options, *, log: Callable[[str], None], keep: Callable[[Result], None] = lambda _: None) -> Result:
    """Start all runs, in turns.

    Args:
        options: the sizes.
        log: called with a line after each start.
        keep: called with what there is so far after each start.

    Raises:
        ConfigError: a start failed or did not end in time, or the earlier version is no checkout.
    """
    if options.before is not None and not (options.before / "pipeline" / "__init__.py").is_file():
        raise ConfigError(
            "is not a checkout of fovea", where=str(options.before), hint="Give a folder made by `git worktree add`"
        )
    result, end = Result(), time.monotonic() + 60 * (options.minutes or math.inf)
    if options.s3_shards:
        result.s3, result.no_s3 = measure_s3(options.s3_shards, limit=options.limit, log=log)
    versions = {"now": ROOT, **({"before": options.before} if options.before else {})}
    with tempfile.TemporaryDirectory(prefix="fovea-startup-") as name:
        folder = Path(name)
        sets = {shards: write_shards(folder, shards) for shards in options.shards}
        for number in range(options.rounds):
            order = sorted(versions, reverse=number % 2 == 0)  # now first, then before first
            for shards, data in sets.items():
                few = min(options.ranks)
                kinds = (
                    [(few, False), *((ranks, True) for ranks in options.ranks)]
                    if number == 0
                    else [(ranks, True) for ranks in options.ranks]
                )
                for ranks, indexed in kinds:
                    for version in order:
                        left_out = version == "before" and indexed and ranks not in options.before_ranks
                        if left_out or time.monotonic() > end:
                            continue
                        start = _start_of(result, version, shards, ranks, indexed)
                        root = versions[version]
                        _measure(start, root, data, folder / f"{version}-index-{shards}", folder / "run", options.limit)
                        log(f"{version:6} {shards} shards, {ranks} ranks, {_index(indexed)}: {_line(start)}")
                        keep(result)
    return result


def _start_of(result: Result, version: str, shards: int, ranks: int, indexed: bool) -> Start:
    for start in result.starts:
        if (start.version, start.shards, start.ranks, start.index) == (version, shards, ranks, indexed):
            return start
    result.starts.append(Start(version, shards, ranks, indexed))
    return result.starts[-1]


def _measure(start: Start, root: Path, data: Path, index: Path, run: Path, limit: float) -> None:
    """Start once, in a new run directory, and add the figures."""
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(exist_ok=True)
    config = run.with_name("startup.yaml")
    config.write_text(yaml.safe_dump(settings(root, f"{data}/train-*.tar", start.ranks, index, run)))
    environment = {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    options = {
        "command": [sys.executable, "-P", "-m", "launch.cli", "train", str(config)],
        "environment": environment,
        "folder": str(run.parent),
    }
    argv = [sys.executable, "-P", str(_PROBE), json.dumps(options)]
    what = f"the start of {root} with {start.shards} shards on {start.ranks} ranks"
    done = run_probe(argv, {**os.environ, "PYTHONPATH": str(ROOT)}, limit=limit, what=what, where=_WHERE)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"{what} failed ({last})", where=_WHERE, hint="See the message")
    costs: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    file = run / "logs" / "attempt-0000" / FILE
    if file.exists() and costs["cpu"] <= min(start.cpu, default=costs["cpu"]):
        start.phases = json.loads(file.read_text())["marks"]
    for name in ("cpu", "wall", "total"):
        getattr(start, name).append(round(costs[name], 3))


def _index(indexed: bool) -> str:
    return "with an index" if indexed else "without an index"


def _line(start: Start) -> str:
    return f"{start.cpu[-1]:.1f} CPU s and {start.wall[-1]:.1f} s to the first step"


def markdown(result: Result, options: Options, machine: Mapping[str, str], command: str) -> str:
    """Render the page: costs by shards and ranks, the phases, and the requests."""
    lines = ["# The start of a run", "", f"`{command}`", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += [
        f"From the command `fovea train` to the end of the first step of a tiny SimCLR model; shards of {SAMPLES} samples. CPU "
        f"seconds are those of all processes. The smallest of {options.rounds} round{'s' if options.rounds > 1 else ''}; where "
        "other work runs beside, wall seconds say more about it than about fovea.",
        "",
    ]
    if options.before:
        lines += ["*Before* is an earlier checkout, measured in the same run, in turns.", ""]
    if options.minutes is not None:
        lines += [
            f"No start was begun after {options.minutes:g} minutes: sizes of the command that have no row were not measured.",
            "",
        ]
    lines += _costs([start for start in result.starts if start.index], "With a finished index", bool(options.before))
    lines += _costs([start for start in result.starts if not start.index], "Without an index", bool(options.before))
    lines += _phases([start for start in result.starts if start.index and start.phases])
    lines += s3_markdown(result.s3, result.no_s3)
    return "\n".join(lines)


def _costs(starts: Sequence[Start], title: str, both: bool) -> list[str]:
    if not starts:
        return []
    heads = ("CPU s", "wall s")
    columns = [f"{head}, before | {head}, now" for head in heads] if both else list(heads)
    lines = [f"## {title}", "", f"| shards | ranks | {' | '.join(columns)} |", f"|{'---:|' * (2 + len(heads) * (1 + both))}"]
    by_kind = {(start.shards, start.ranks, start.version): start for start in starts}
    for shards, ranks in dict.fromkeys((start.shards, start.ranks) for start in starts):
        cells = []
        for name in ("cpu", "wall"):
            for version in ("before", "now") if both else ("now",):
                start = by_kind.get((shards, ranks, version))
                cells.append(f"{min(getattr(start, name)):.1f}" if start is not None else "not measured")
        lines.append(f"| {shards:,} | {ranks} | {' | '.join(cells)} |")
    return [*lines, ""]


def _phases(starts: Sequence[Start]) -> list[str]:
    if not starts:
        return []
    names = dict.fromkeys((mark["process"], mark["name"]) for start in starts for mark in start.phases)
    lines = [
        "## Where it goes",
        "",
        "Wall seconds of each phase, in parentheses CPU seconds of the process itself: of the launcher, and of rank 0. *rank "
        "process* is the wait for the process that imports torch, DeepSpeed and DALI and forks the ranks; that begins before "
        "*launcher imports*.",
        "",
        "| shards | ranks | " + " | ".join(f"{process} {name}" for process, name in names) + " |",
        f"|{'---:|' * (2 + len(names))}",
    ]
    for start in starts:
        spans = dict(_spans(start.phases))
        cells = [f"{spans[key][0]:.1f} ({spans[key][1]:.2f})" if key in spans else "" for key in names]
        lines.append(f"| {start.shards:,} | {start.ranks} | {' | '.join(cells)} |")
    return [*lines, ""]


def _spans(marks: Iterable[Mapping[str, Any]]) -> Iterable[tuple[tuple[str, str], tuple[float, float]]]:
    """Wall and CPU seconds of each phase: from the mark before, of the same process for CPU."""
    wall, cpu = 0.0, dict[str, float]()
    for mark in marks:
        process = mark["process"]
        yield (process, mark["name"]), (mark["seconds"] - wall, mark["cpu"] - cpu.get(process, 0.0))
        wall, cpu[process] = mark["seconds"], mark["cpu"]


def document(result: Result, options: Options) -> dict[str, Any]:
    """All figures, for the JSON file."""
    return {**asdict(result), "rounds": options.rounds, "minutes": options.minutes}
