"""Decides what a replay executes: the steps, the checkpoint it starts from, the number of ranks, the settings. Does not import
torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.checkpoint import catalog
from pipeline.checkpoint.files import Saved, read, verify
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.config.validate import check_ranks
from pipeline.data.order.order import divisors
from pipeline.errors import CheckpointError, ConfigError
from pipeline.runtime.gpus import gpus
from pipeline.runtime.run_directory import RunDirectory
from pipeline.training.rollback import SkippedSteps
from pipeline.training.signature_file import Header
from pipeline.untrusted import printable

MOST_RANKS = 256  # that are started unless more are asked for
AROUND = 5  # steps before and after a spike


@dataclass(frozen=True)
class Start:
    """Where a replay starts.

    Attributes:
        step: its first step.
        saved: the checkpoint, ``None`` for the run's own start.
        notes: checkpoints that were passed over.
    """

    step: int
    saved: Saved | None
    notes: tuple[str, ...] = ()


def check_range(recorded: int, step: int, until: int | None) -> tuple[int, int]:
    """The first and the last step to replay.

    Args:
        recorded: the last step that the run has done.
        step, until: as requested; without ``until`` only ``step``.

    Raises:
        ConfigError: steps that the run has not done, or in the wrong order.
    """
    last = step if until is None else until
    if not 0 <= step <= last:
        raise ConfigError(f"steps {step} to {last} are not a range", where="--until", hint="Give a step at or after --step")
    if last > recorded:
        raise ConfigError(
            f"step {last} is beyond the last recorded one, {recorded}",
            where="--step" if until is None else "--until",
            hint="Give a step from 0 on up to it",
        )
    return step, last


def spike(losses: dict[int, float]) -> tuple[int, int]:
    """The two steps of a journal between which the loss rises most; from a number to none counts as most.

    Args:
        losses: means since the step before, by step.

    Raises:
        ConfigError: fewer than two losses.
    """
    points = sorted(losses.items())
    if len(points) < 2:
        raise ConfigError("the journals have fewer than two losses", where="--spike", hint="Give --step instead")
    rises = [(rise(then, now), before, after) for (before, then), (after, now) in pairwise(points)]
    _, before, after = max(rises, key=lambda entry: (entry[0], -entry[1]))
    return before, after


def rise(then: float, now: float) -> float:
    """How much a loss rises; from a finite one to another that is not finite infinitely."""
    if not math.isfinite(now):
        return math.inf if math.isfinite(then) else -math.inf
    return now - then if math.isfinite(then) else -math.inf


def start_before(run: RunDirectory, config: Config, step: int, *, from_start: bool) -> Start:
    """The newest verified checkpoint at or before a step; the run's start, if none was ever written before it.

    Args:
        run: the run.
        config: its settings.
        step: the first step to compare or dump.
        from_start: execute from step 0, whatever checkpoints there are.

    Raises:
        CheckpointError: retention has deleted all checkpoints before the step, or they are damaged.
    """
    resume = config.checkpoint.resume
    origin = Path(resume) if resume not in ("auto", "never") else None
    rows = catalog.rows(run.checkpoints)
    candidates = sorted((row for row in rows if row.step <= step), key=lambda row: (row.step, row.serial), reverse=True)
    paths = [run.checkpoints / row.name for row in candidates] if not from_start else []
    notes = []
    for path in [*paths, *([origin] if origin is not None else [])]:
        try:
            saved = read(path)
            if saved.step > step:
                continue
            verify(saved)
        except CheckpointError as error:
            notes.append(str(error))
            continue
        return Start(saved.step, saved, tuple(notes))
    first = min(rows, key=lambda row: (row.step, row.serial), default=None)
    if origin is None and (from_start or (not candidates and (first is None or first.serial <= 1))):
        return Start(0, None, tuple(notes))
    if notes:
        raise CheckpointError(
            f"no checkpoint at or before step {step} is complete; the newest: {notes[0]}",
            where=printable(str(run.checkpoints)),
            hint="Restore one from a copy, or give --from-start to execute all steps from 0",
        )
    nearest = f"the nearest is that of step {first.step}" if first is not None else "there are none"
    instead = "" if origin is not None else ", or give --from-start to execute all steps from 0"
    raise CheckpointError(
        f"the checkpoints at or before step {step} were deleted by checkpoint.keep_last; {nearest}",
        where=printable(str(run.checkpoints)),
        hint=f"Choose a later step, or restore a checkpoint from a copy{instead}",
    )


def ranks_of(header: Header | None, config: Config, requested: int | None) -> int:
    """Number of ranks: as requested, as recorded, or on fewer GPUs the largest number that can share the batch.

    Raises:
        ConfigError: more ranks than recorded, or so many that they must be asked for.
    """
    world = header.world if header is not None else config.launch.num_processes or 1
    if requested is not None:
        if requested > world:
            raise ConfigError(f"{requested} ranks are more than the {world} of the run", where="--ranks", hint="Give fewer")
        return requested
    if world > MOST_RANKS:
        raise ConfigError(
            f"the run had {world} ranks, which are not started by default", where="--ranks", hint="Give a number of ranks"
        )
    available = gpus() if on_gpu(header, config) else 0
    if not available or available >= world:
        return world
    return max(count for count in divisors(world) if count <= available)


def on_gpu(header: Header | None, config: Config) -> bool:
    """Whether the run used GPUs."""
    return header.device != "cpu" if header is not None else config.launch.backend != "gloo"


def settings(run: RunDirectory, scratch: Path, ranks: int, header: Header | None, streams: int, changes: Sequence[str]) -> Config:
    """The settings of the replay.

    Args:
        run: the run.
        scratch: the scratch directory, which replaces the run's.
        ranks: number of ranks.
        header: what the run recorded of the attempt, whose ranks, stage and threads are used.
        streams: number of streams of the run's order of samples.
        changes: texts ``KEY=VALUE``.

    Raises:
        ConfigError: settings that cannot be read or changed so, or a number of ranks that cannot share the batch.
    """
    file = scratch / "settings.yaml"
    file.write_text(json.dumps(run.settings_document()))
    as_recorded = [f"launch.num_processes={ranks}"]
    if not any(change.startswith("train.global_batch_size") for change in changes):
        as_recorded.append(f"data.canonical_streams={streams}")
    if header is not None:
        as_recorded.append(f"train.zero_stage={header.zero_stage}")
        if header.threads and header.device == "cpu":
            as_recorded.append(f"train.threads={header.threads}")
    if not (on_gpu(header, run.settings()) and gpus()):
        as_recorded.append("launch.backend=gloo")
    apart = ("tracking.enabled=false", "checkpoint.mirror=null", "checkpoint.resume=auto", "checkpoint.keep_best=null")
    own = (
        *apart,
        "train.record_batches=false",
        "train.signatures=true",
        "train.verify_every=null",
        "train.pause_at=null",
        f"run.directory={scratch}",
    )
    # Fewer ranks work through the same micro-batches, which matters to losses that compare the samples of one.
    divided = [f"train.micro_batch_size={header.micro_batch}"] if header is not None and ranks < header.world else []
    try:
        config = load(file, [*as_recorded, *divided, *changes, *own]).config
    except ConfigError:
        if not divided:
            raise
        config = load(file, [*as_recorded, *changes, *own]).config
    config = config.replace(evaluation=config.evaluation.only())
    if broken := check_ranks(config, ranks):
        raise ConfigError(broken[0][1])
    return config


def accumulation_of(header: Header | None, config: Config) -> int | None:
    """Micro-batches per rank of the run, if those of the replay are as large, so that they draw the same random numbers."""
    if header is None or config.train.micro_batch_size != header.micro_batch:
        return None
    return config.train.global_batch_size // header.world // header.micro_batch


def write_skipped_steps(run: RunDirectory, scratch: Path, step: int) -> tuple[list[tuple[int, int]], bool]:
    """Lets the replay leave out the steps that the run left out after rollbacks, up to the one that left out ``step``.

    Returns:
        The stretches of steps that are left out, and whether ``step`` was one of those of the run.
    """
    stretches = SkippedSteps(run.path / "skipped_steps.json").stretches
    position = next((position for position, (first, last) in enumerate(stretches) if first <= step <= last), None)
    kept = stretches[:position]
    if kept:
        (scratch / "skipped_steps.json").write_text(json.dumps({"steps": kept}))
    return kept, position is not None
