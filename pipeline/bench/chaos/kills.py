"""Kills ranks of one run again and again, which are replaced within the launch: cost of each death, and the bits at the end."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from pipeline.bench.chaos.observe import differing, weights
from pipeline.bench.chaos.runs import Run, failed, kill, until
from pipeline.bench.chaos.site import BATCH, Site
from pipeline.bench.chaos.statistics import quantile
from pipeline.runtime.interpreter import ROOT
from pipeline.runtime.run_directory import RunDirectory

_BETWEEN = 8  # new steps at most between a restart and the next death
_WITHIN = 0.15  # seconds, more than a step: the moment within a step is random
_MARGIN = 4  # steps after the last death


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        kills: number of deaths.
        ranks: number of ranks.
        every: steps between two snapshots.
        seed: decides moments and ranks.
    """

    kills: int = 100
    ranks: int = 4
    every: int = 2
    seed: int = 0

    @property
    def steps(self) -> int:
        """Length of the run, long enough for all deaths."""
        return self.kills * (_BETWEEN + 1) + _MARGIN


@dataclass(frozen=True)
class Death:
    """The death of a rank.

    Attributes:
        rank: which.
        step: steps that were complete.
        resumed: step from which the ranks started again.
        noticed: seconds from the death until they were started.
        started: seconds from there until the first step was complete.
    """

    rank: int
    step: int
    resumed: int
    noticed: float
    started: float


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        deaths: all deaths.
        ended: whether the run came to its end.
        equal: whether weights, optimizer state and the signatures of all steps of all attempts are those of an undisturbed run.
        samples_wrong: samples of steps whose batch was another one, or is missing.
        cold: seconds from typing the command to the first step.
    """

    deaths: list[Death]
    ended: bool
    equal: bool
    samples_wrong: int
    cold: float


def measure(options: Options, directory: Path, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Train twice, undisturbed and with deaths.

    Args:
        options: see there.
        directory: shards, and the undisturbed run, which is used again.
        log: called with a line about each death.

    Raises:
        TrainingError: a run does not do what its user expects.
    """
    with Site(directory, every=50) as site:
        own = (f"launch.num_processes={options.ranks}", "checkpoint.keep_last=2")
        reference = directory / f"undisturbed-{options.steps}-{options.ranks}-ranks"
        shards = f"{site.directory / 'scenes'}/*train-*.tar"
        if not weights(reference, options.steps):
            log("training undisturbed")
            command = site.command("train", options.steps, site.config, shards, reference, *own)
            done = subprocess.run(command, env=site.environment(), cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise failed(f"the undisturbed run failed: {(done.stderr or done.stdout)[-500:]}")
        snapshots = (f"launch.restarts={2 * options.kills}", f"checkpoint.snapshot_every={options.every} steps")
        folder = site.scratch / "run"
        command = site.command("train", options.steps, site.config, shards, folder, *own, *snapshots)
        run = Run(folder, command, site.environment(), options.steps, site.scratch / "log", ROOT)
        try:
            run.start()
            deaths = _kill(run, options, log)
            ended = run.ended()
        finally:
            run.close()
        unequal, wrong = differing(folder, reference, BATCH)
        equal = ended and unequal == 0 and weights(folder, options.steps) == weights(reference, options.steps)
        return Result(deaths, ended, equal, wrong, run.progress.firsts[0] - run.launches[0])


def _kill(run: Run, options: Options, log: Callable[[str], None]) -> list[Death]:
    rng, deaths, attempt = Random(options.seed), list[Death](), 0
    while len(deaths) < options.kills:
        run.reach(run.progress.steps + rng.randint(1, _BETWEEN))
        time.sleep(rng.uniform(0, _WITHIN))
        rank = rng.randrange(options.ranks)
        moment, clock, step = time.monotonic(), time.time(), run.progress.steps
        if not kill(run.rank(rank, attempt)):
            raise failed(f"rank {rank} is gone before it was killed")
        attempt += 1
        until(partial(_started, run, attempt), "the ranks did not start again")
        if attempt not in run.progress.firsts:
            raise failed("the run ended with a killed rank")
        rows = RunDirectory(run.directory).attempts()
        start = next(row for row in rows if row["event"] == "start" and row["attempt"] == attempt)
        noticed = max(float(start["t"]) - clock, 0.0)
        resumed = int(start["resumed_from"] or 0)
        deaths.append(Death(rank, step, resumed, noticed, run.progress.firsts[attempt] - moment - noticed))
        log(f"{len(deaths)}: {line(deaths[-1])}")
    return deaths


def _started(run: Run, attempt: int) -> bool:
    """Whether an attempt has completed a step, or none will."""
    return attempt in run.progress.firsts or not run.running()


def line(death: Death) -> str:
    """One death in a line."""
    return (
        f"rank {death.rank} killed after step {death.step}; from step {death.resumed}; "
        f"{death.noticed:.1f} s to notice, {death.started:.1f} s to the first step"
    )


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """Render the page."""
    deaths = result.deaths
    again = [death.step - death.resumed for death in deaths]
    lines = ["# Ranks that are killed", "", f"`{command}`", "", *(f"- {name}: {value}" for name, value in machine.items())]
    lines += [
        f"- one run: DINOv2 on synthetic scenes, toy size, {options.ranks} ranks on the CPU, {options.steps} steps of {BATCH} "
        f"samples, a snapshot every {options.every} steps; {len(deaths)} times a random rank is killed (SIGKILL) at a random "
        f"moment, 1 to {_BETWEEN} new steps after the restart before",
        "",
        f"**The run {'came' if result.ended else 'did not come'} to its end, and its bits are "
        f"{'' if result.equal else 'NOT '}those of an undisturbed run**: weights, optimizer state and teacher of the last "
        f"checkpoint, and the signatures of all steps of all attempts. Samples lost or doubled: {result.samples_wrong}.",
        "",
        "| | median | 95 % | most |",
        "|---|---:|---:|---:|",
        _row("steps executed again", again, "g"),
        _row("seconds from a death to the start of all ranks", [death.noticed for death in deaths], ".1f"),
        _row("seconds from their start to the first step", [death.started for death in deaths], ".1f"),
        _row("seconds from a death to the next step", [death.noticed + death.started for death in deaths], ".1f"),
        "",
        f"The first start of the run, from typing the command to its first step, took {result.cold:.1f} s. Later ranks are "
        "forked from a process that has imported everything. A snapshot is complete some steps after it was begun, so that more "
        "steps than the interval can be executed again; none of them counts twice.",
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, values: Sequence[float], form: str) -> str:
    three = (statistics.median(values), quantile(values, 0.95), max(values))
    return f"| {name} | {' | '.join(format(value, form) for value in three)} |"
