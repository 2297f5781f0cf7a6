"""``fovea replay``: executes steps of a run again in a scratch directory and compares them with what the run recorded."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch import local
from launch.cli import shards_ls
from launch.replay import plan, recorded
from launch.replay.plan import Start
from launch.replay.recorded import Overview
from launch.replay.report import Replay, losses_of, print_start, report
from pipeline.checkpoint import catalog
from pipeline.config.schema import Config
from pipeline.data.inputs import Inputs, prepare
from pipeline.errors import CheckpointError, ConfigError
from pipeline.masking import shown
from pipeline.runtime.interpreter import module_command
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import printable


@dataclass(frozen=True)
class ReplayOptions:
    """The command line of ``fovea replay``.

    Attributes:
        step: first step to compare.
        until: last step; by default the first.
        spike: replay around the largest rise of the loss instead.
        sample: replay the first step with this sample instead.
        ranks: number of ranks; by default as recorded.
        changes: other settings, ``KEY=VALUE``.
        without: keys of samples to substitute.
        dump: folder for batches, activations and gradients.
        from_start: execute from step 0.
    """

    step: int | None = None
    until: int | None = None
    spike: bool = False
    sample: str | None = None
    ranks: int | None = None
    changes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    dump: Path | None = None
    from_start: bool = False

    @property
    def changed(self) -> bool:
        """Whether something else than the run is executed."""
        return bool(self.changes or self.without)


def run(directory: Path, options: ReplayOptions) -> int:
    """Replay; returns 0 if everything is equal, 1 if something differs, else the code of the ranks that failed.

    Raises:
        FoveaError: steps, checkpoints, data or settings with which nothing can be replayed.
    """
    if (options.step is not None) + options.spike + (options.sample is not None) != 1:
        raise ConfigError("needs one of --step, --spike and --sample", where="fovea replay", hint="Give one, such as --step 1234")
    if options.spike and options.until is not None:
        raise ConfigError("has no meaning with --spike", where="--until", hint="Give --step with it, or neither")
    if options.dump is not None and options.dump.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(
            "must lie outside the run, of which nothing is changed",
            where=f"--dump {printable(str(options.dump))}",
            hint="Name another folder",
        )
    of_run = RunDirectory(directory)
    config = of_run.settings()
    overview = _overview(of_run, options)
    with tempfile.TemporaryDirectory(prefix="fovea-replay-") as name:
        scratch = Path(name).resolve()
        own: tuple[str, ...] = ()
        if config.data.index_root.resolve().is_relative_to(directory.resolve()):  # an index is written to where it is used
            config = config.replace(data=config.data.model_copy(update={"index": scratch / "index"}))
            own = (f"data.index={scratch / 'index'}",)
        inputs = _inputs(config, directory, _first_world(overview))
        first, last = _range(of_run, overview, inputs, config, options)
        header = overview.headers.get(overview.attempts.get(first, -1))
        ranks = plan.ranks_of(header, config, options.ranks)
        start = plan.start_before(of_run, config, first, from_start=options.from_start)
        settings = plan.settings(of_run, scratch, ranks, header, inputs.order.streams, (*options.changes, *own))
        left_out, again = plan.write_skipped_steps(of_run, scratch, first)
        checkpoints = {
            row.step: (of_run.checkpoints / row.name).resolve()
            for row in catalog.rows(of_run.checkpoints)
            if start.step < row.step <= last + 1
        }
        request = {
            "first": first,
            "until": last,
            "checkpoints": {step: str(path) for step, path in checkpoints.items()},
            "excluded": [number for key in options.without for number in _numbers(config, inputs, key, last + 1)],
            "accumulation": plan.accumulation_of(header, settings),
            "dump": str(options.dump.resolve()) if options.dump is not None else None,
        }
        (scratch / "replay.json").write_text(json.dumps(request))
        target = RunDirectory(scratch)
        target.write_settings(settings)
        print_start(directory, start, first, last, ranks, again=again)
        path = str(start.saved.path) if start.saved is not None else "-"
        argv = module_command("launch.replay.rank", str(target.config), "0", path)
        if code := local.start(argv, ranks, log_directory=target.logs(0), threads=settings.train.threads):
            return code
        steps = [step for step in range(start.step, last + 1) if not any(a <= step <= b for a, b in left_out)]
        replay = _read(of_run, target, overview, start, (first, last), steps, ranks)
    if options.dump is not None:
        print(f"batches, activations and gradients are in {printable(str(options.dump))}")
    if not overview.attempts:
        return 0
    return report(replay, config, settings, inputs, changes=options.changes, without=options.without)


def _overview(run: RunDirectory, options: ReplayOptions) -> Overview:
    try:
        return recorded.overview(run)
    except ConfigError:
        if options.dump is None or options.step is None or options.changed:
            raise
        return Overview()


def _first_world(overview: Overview) -> int:
    """Number of ranks of the attempt that began the run; any that divides its batch will do."""
    attempt = overview.attempts.get(0, min(overview.headers, default=-1))
    return overview.headers[attempt].world if attempt in overview.headers else 1


def _inputs(config: Config, directory: Path, world: int) -> Inputs:
    """The run's data; the shards of its evaluations are not needed and may be missing."""
    run = config.run.model_copy(update={"directory": directory.absolute()})
    return prepare(config.replace(evaluation=config.evaluation.only(), run=run), world)


def _range(of_run: RunDirectory, overview: Overview, inputs: Inputs, config: Config, options: ReplayOptions) -> tuple[int, int]:
    """The first and the last step to compare."""
    if options.step is not None:
        return plan.check_range(_last(overview, inputs, config), options.step, options.until)
    if options.sample is not None:
        rows = _seen(config, inputs, options.sample, overview.last + 1)
        if not rows:
            raise ConfigError(
                f"no step up to {overview.last} has the sample {printable(options.sample)!r}",
                where="--sample",
                hint="See `fovea shards ls --key`",
            )
        steps = sorted({row["step"] for row in rows})
        print(shown(f"{printable(options.sample)} is in steps {', '.join(map(str, steps[:20]))}{'…' if len(steps) > 20 else ''}"))
        return plan.check_range(overview.last, _first_within_reach(of_run, config, steps, options), options.until)
    from pipeline.reports.history import read_history

    before, after = plan.spike(read_history(of_run, most=1 << 20).metrics.get("train/loss", {}))
    begin = max(before - config.train.log_every, 0)
    world = max(header.world for header in overview.headers.values())
    ranks = recorded.of_ranks(of_run, world, overview.attempts, begin, after)
    losses = losses_of([one.signatures for one in ranks], range(begin, after + 1))
    rises = {now: plan.rise(losses[then], losses[now]) for then, now in pairwise(losses)}
    step = max(rises, key=lambda one: rises[one], default=min(after, overview.last))
    print(
        f"the loss rises most at step {step}"
        + (f", from {losses[step - 1]:.6g} to {losses[step]:.6g}" if step - 1 in losses else "")
    )
    return max(step - plan.AROUND, 0), min(step + plan.AROUND, overview.last)


def _last(overview: Overview, inputs: Inputs, config: Config) -> int:
    """The last step that can be replayed: the last recorded one, or without signatures that of the plan."""
    if overview.attempts:
        return overview.last
    return config.train.duration.steps(inputs.order.samples_per_epoch, config.train.global_batch_size) - 1


def _first_within_reach(of_run: RunDirectory, config: Config, steps: list[int], options: ReplayOptions) -> int:
    """The first of some steps with a checkpoint at or before it; the last one, if none has."""
    for step in steps:
        with contextlib.suppress(CheckpointError):
            plan.start_before(of_run, config, step, from_start=options.from_start)
            return step
    return steps[-1]


def _seen(config: Config, inputs: Inputs, key: str, last: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = shards_ls.of_key(config, inputs, key, 1, last)["seen"]
    return rows


def _numbers(config: Config, inputs: Inputs, key: str, last: int) -> list[int]:
    """Numbers of the samples with a key.

    Raises:
        ConfigError: no step of the replay has it.
    """
    if numbers := sorted({row["id"] for row in _seen(config, inputs, key, last)}):
        return numbers
    raise ConfigError(
        f"no step up to {last - 1} has the sample {printable(key)!r}", where="--without", hint="See `fovea shards ls --step`"
    )


def _read(
    of_run: RunDirectory,
    scratch: RunDirectory,
    overview: Overview,
    start: Start,
    bounds: tuple[int, int],
    steps: list[int],
    ranks: int,
) -> Replay:
    last = bounds[1]
    replayed_overview = recorded.overview(scratch)
    header = replayed_overview.headers[0]
    of_step = {step: overview.headers[overview.attempts[step]] for step in steps if step in overview.attempts}
    world = max((one.world for one in of_step.values()), default=0)
    tensors = []
    for rank in range(ranks):
        path = scratch.path / f"tensors-rank-{rank}.jsonl"
        tensors += [(rank, json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    return Replay(
        start,
        bounds[0],
        last,
        steps,
        recorded.of_ranks(of_run, world, overview.attempts, start.step, last),
        recorded.of_ranks(scratch, ranks, replayed_overview.attempts, start.step, last),
        of_step,
        header,
        tensors,
    )
