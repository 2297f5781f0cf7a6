"""Draws faults, injects each into a run of its own, and measures what it cost."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from pipeline.bench.chaos import records
from pipeline.bench.chaos.catalogue import catalogue
from pipeline.bench.chaos.kinds import SAME, Case, Kind
from pipeline.bench.chaos.observe import differing, lost_seconds, repeated, usual_step, weights
from pipeline.bench.chaos.records import Row
from pipeline.bench.chaos.runs import Run
from pipeline.bench.chaos.site import BATCH, Site
from pipeline.bench.chaos.slurm_faults import SlurmRun
from pipeline.errors import FoveaError
from pipeline.runtime.interpreter import ROOT

ROWS = "rows.jsonl"
# Of the run, of a tool such as mount, or of a server of the tests: one fault fails, not the benchmark.
_FAILURES = (FoveaError, OSError, subprocess.SubprocessError, AssertionError)
_STARTS = 4  # times that the user types the command before giving up
_BETWEEN = 0.15  # seconds, more than a step: the moment within a step is random


def draw(kinds: Sequence[str], faults: int, seed: int) -> list[tuple[str, int]]:
    """Kinds and numbers of faults: every kind as often as any other, up to one, in an order that the seed decides."""
    rng = Random(seed)
    order: list[tuple[str, int]] = []
    for number in range(-(-faults // len(kinds))):
        order += [(kind, number) for kind in rng.sample(list(kinds), len(kinds))]
    return order[:faults]


def measure(
    kinds: Sequence[str], directory: Path, *, faults: int, seed: int, log: Callable[[str], None] = lambda _: None
) -> Iterator[Row]:
    """Yield each fault that the directory lacks, as soon as it is measured and its row is written there.

    Args:
        kinds: names of kinds, see :func:`~pipeline.bench.chaos.catalogue.catalogue`.
        directory: rows, shards and undisturbed runs.
        faults: number of faults in all.
        seed: decides order, moments and details.
        log: reports what is left out.
    """
    known = {row.key for row in records.read(directory / ROWS)}
    lacking = [(kind, number) for kind, number in draw(kinds, faults, seed) if (kind, number, seed) not in known]
    if not lacking:
        return
    table = catalogue()
    with Site(directory) as site:
        reasons = {kind: table[kind].missing(site) for kind in kinds}
        for kind, reason in reasons.items():
            if reason:
                log(f"{kind} is left out: {reason}")
        for kind, number in lacking:
            if not reasons[kind]:
                row = one(table[kind], number, seed, site)
                if row.detail:
                    records.append(directory / ROWS, row)
                    yield row
                else:
                    log(f"{kind} {number} was not injected: {row.error or 'the run ended, or made no such request, before it'}")


def one(kind: Kind, number: int, seed: int, site: Site) -> Row:
    """Inject one fault into a run of its own; a row without detail if nothing was done to the run."""
    rng = Random(f"{seed}/{kind.name}/{number}")
    at, within = rng.randint(kind.first, kind.steps - kind.margin), rng.uniform(0, _BETWEEN)
    folder = site.scratch / f"{kind.name}-{number}"
    folder.mkdir()
    reference = site.reference(kind.steps)
    with contextlib.ExitStack() as stack:
        case = Case(site, folder, rng, stack, action=SAME)
        run = Run(folder / "run", [], {}, kind.steps, folder / "log", ROOT)
        detail, error, after, fault, before, ended = "", "", "", 0.0, 0, False
        begin = time.monotonic()
        try:
            kind.prepare(case)
            run = _run(case, kind)
            stack.callback(run.close)
            run.start()
            run.reach(at)
            time.sleep(within)
            fault, before = time.monotonic(), run.progress.steps
            detail = kind.inject(case, run)
            ended = _to_the_end(case, run)
            seconds = time.monotonic() - begin
            after = case.finish(run) if ended and case.finish is not None else ""
        except _FAILURES as problem:
            error, seconds = str(problem) or type(problem).__name__, time.monotonic() - begin
        if case.happened is not None:
            detail = case.happened()
        run.progress.look()
        unequal, wrong = differing(run.directory, reference, BATCH)
        same = ended and not error and unequal == 0 and weights(run.directory, kind.steps) == weights(reference, kind.steps)
        times, launches = run.progress.times, run.launches
        firsts = sorted(run.progress.firsts.values())
        starts = [min(later) - launch for launch in launches if (later := [first for first in firsts if first > launch])]
        row = Row(
            kind=kind.name,
            number=number,
            seed=seed,
            detail=detail.replace(str(folder), "…"),
            step=before,
            ended=ended,
            equal=same,
            steps_lost=repeated(run.directory),
            seconds_lost=round(lost_seconds(times, fault, run.progress.last), 3),
            samples_wrong=wrong,
            attempts=len(run.progress.firsts),
            action=", then ".join(filter(None, [case.action if len(launches) > 1 else "", after])),
            seconds=round(seconds, 3),
            start=round(statistics.median(starts), 3) if starts else 0.0,
            usual=round(usual_step(times), 4),
            error=(error or ("" if same else run.reported())).replace(str(folder), "…")[:300],
        )
        if not same:
            _keep(run, site.directory / "failed" / f"{kind.name}-{number}-{seed}", folder)
    shutil.rmtree(folder, ignore_errors=True)
    return row


def _run(case: Case, kind: Kind) -> Run:
    site, directory = case.site, case.directory or case.folder / "run"
    shards = case.shards or f"{site.directory / 'scenes'}/*train-*.tar"
    overrides = list(case.overrides)
    if not kind.slurm:
        command = site.command("train", kind.steps, site.config, shards, directory, *overrides)
        return Run(directory, command, site.environment(**case.environment), kind.steps, case.folder / "log", ROOT)
    cluster = site.slurm()
    overrides += ["--cluster", str(site.profile(case.folder))]
    command = site.command("submit", kind.steps, site.config, shards, directory, *overrides)
    environment = {**site.environment(**case.environment), **cluster.environment, **case.environment}
    run = SlurmRun(directory, command, environment | {"OMP_NUM_THREADS": "1"}, kind.steps, case.folder / "log", ROOT)
    run.cluster = cluster
    return run


def _to_the_end(case: Case, run: Run) -> bool:
    """The user's part: look whether the run has ended, else repair what is broken and type the command again."""
    for _ in range(_STARTS):
        if run.ended():
            return True
        if case.repair is not None:
            case.repair()
        run.start()
    return run.ended()


def _keep(run: Run, to: Path, folder: Path) -> None:
    """Keep the logs of a run that did not end as it should."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for name in ("logs", "attempts.jsonl", "outcome.json", "final_state.json", "signatures"):
        source = run.directory / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore_dangling_symlinks=True)
        elif source.is_file():
            shutil.copy(source, to / name)
    if (folder / "log").is_file():
        shutil.copy(folder / "log", to / "output.log")
