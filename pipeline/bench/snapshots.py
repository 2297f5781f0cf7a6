"""Benchmarks snapshots in host memory: seconds of a step without them, with them, and with ordinary checkpoints.

Ranks on the CPU train DINOv2 on random images, in rounds: in each of them every case takes its turn, in another order, so that a
slower machine slows all of them. As in a training, states are copied while training pauses and written while it continues, and
the ranks agree on both in the all-reduce of each step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.bench import checkpoint
from pipeline.bench.ranks import on_ranks
from pipeline.bench.reproduction.agreement import Interval, interval
from pipeline.checkpoint.files import committed_checkpoints
from pipeline.checkpoint.memory import Snapshots
from pipeline.checkpoint.writer import Checkpoints, Outcome
from pipeline.errors import ConfigError
from pipeline.methods.base import Step
from pipeline.runtime.stop_requests import StopRequests
from pipeline.training.engine import Engine, EngineOptions

PLAIN, OFTEN, ALWAYS, ON_DISK = "none", "snapshot_every_n", "snapshot_every_step", "checkpoint_every_n"
CASES = (PLAIN, OFTEN, ALWAYS, ON_DISK)
KINDS = ("snapshot", "checkpoint")


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        model: size of the ViT, one of :data:`pipeline.bench.checkpoint.MODELS`.
        batch: samples of a step on each rank.
        side: of the two global crops, pixels; the four local crops have half of it.
        prototypes: per head; there are two heads.
        every: steps between two snapshots, or two checkpoints.
        steps: of a case in a round; a multiple of ``every``.
        rounds: measured rounds.
        ranks: gloo ranks on this host, of one thread each.
    """

    model: str = "tiny"
    batch: int = 8
    side: int = 96
    prototypes: int = 4096
    every: int = 10
    steps: int = 20
    rounds: int = 8
    ranks: int = 2


@dataclass(frozen=True)
class Result:
    """Results of rank 0.

    Attributes:
        parameters: of the student.
        size: bytes of a checkpoint, and of a snapshot.
        seconds: of a step, mean of each round, by case; the wait for the last write counts.
        pauses: seconds for which training paused for a snapshot, and for a checkpoint.
    """

    parameters: int
    size: int
    seconds: dict[str, list[float]]
    pauses: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, case: str) -> Interval:
        """Seconds of a step relative to one without snapshots in the same round: mean and 95 % interval."""
        return interval([own / plain for own, plain in zip(self.seconds[case], self.seconds[PLAIN], strict=True)])


class _Training:
    """A small training with both kinds of savepoints."""

    def __init__(self, options: Options, memory: Path, disk: Path) -> None:
        self.options, self.number = options, 0
        device = torch.device("cpu")
        control: Any = dist.new_group(backend="gloo")
        sizes = checkpoint.Options(options.model, options.batch, options.side, options.prototypes)
        self.method, self.batch = checkpoint.make_method(sizes, device)
        self.engine = Engine(self.method, EngineOptions(2, "fp32", options.batch, 1, (0.9, 0.999), 1e-8, 3.0, "network"), device)
        self.stores: dict[str, Snapshots | Checkpoints] = {
            "snapshot": Snapshots(memory, 1, group=control),
            "checkpoint": Checkpoints(disk, keep_last=2, group=control),
        }
        self.requests, self.control = StopRequests(), control
        self.pauses: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def step(self, kind: str | None) -> None:
        """A step, as the trainer takes it, and a savepoint of a kind after it."""
        at = Step(index=self.number, lr=1e-4, last_layer_lr=1e-4, momentum=0.99)
        terms = self.engine.forward_backward(self.batch, at)
        self.engine.step(at, torch.stack(list(terms.values())).isfinite().all())
        self.method.after_step(at)
        self.number += 1
        snapshots, checkpoints = self.stores["snapshot"], self.stores["checkpoint"]
        self.requests.agreed(self.control, checkpoints.state, snapshots.state)
        _check(checkpoints.poll(self.requests.saving))
        _check(snapshots.poll(self.requests.snapshot))
        if kind is not None:
            fields = {"step": self.number, "applied": self.number, "skipped": 0, "scores": {}, "config": {}, "data": {}}
            begin = time.perf_counter()
            _check(self.stores[kind].begin(self.engine, self.method, fields))
            self.pauses[kind].append(time.perf_counter() - begin)

    def finish(self) -> None:
        """Waits for what is being written."""
        for store in self.stores.values():
            _check(store.finish())

    def turn(self, case: str) -> float:
        """Mean seconds of the steps of a case."""
        every = {OFTEN: self.options.every, ALWAYS: 1, ON_DISK: self.options.every}.get(case, 0)
        dist.barrier()
        begin = time.perf_counter()
        for n in range(1, self.options.steps + 1):
            due = every and n % every == every // 2  # in the middle, so that the steps of this turn run beside the write
            self.step(("checkpoint" if case == ON_DISK else "snapshot") if due else None)
        self.finish()
        dist.barrier()
        return (time.perf_counter() - begin) / self.options.steps


def _check(outcome: Outcome | None) -> None:
    if outcome is not None and outcome.error is not None:
        raise outcome.error


def train(options: Options, memory: Path, disk: Path) -> Result:
    """On a rank: train in rounds.

    Args:
        options: see :class:`Options`.
        memory: folder in host memory.
        disk: folder on the disk.

    Raises:
        CheckpointError: a snapshot or a checkpoint could not be written.
    """
    training = _Training(options, memory, disk)
    for kind in KINDS:  # the first savepoint of a kind allocates its host memory
        training.step(kind)
        training.finish()
    for pauses in training.pauses.values():
        pauses.clear()
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    for number in range(options.rounds):
        first = number % len(CASES)
        for case in (*CASES[first:], *CASES[:first]):
            seconds[case].append(training.turn(case))
    size = sum(file["size"] for file in committed_checkpoints(disk)[-1].manifest["files"])
    training.engine.close()
    return Result(sum(p.numel() for p in training.method.parameters()), size, seconds, training.pauses)


def measure(
    options: Options, memory: Path, *, directory: Path | None = None, log: Callable[[str], None] = lambda _: None
) -> Result:
    """Measure on newly started ranks.

    Args:
        options: see :class:`Options`.
        memory: folder in host memory.
        directory: folder on the disk of the checkpoints; by default a temporary one.
        log: reports progress.

    Raises:
        ConfigError: no such model, steps that are not a multiple of ``every``, or ranks that failed.
    """
    if options.model not in checkpoint.MODELS:
        raise ConfigError(
            f"{options.model!r} is not a size", where="--model", hint=f"Choose one of {', '.join(checkpoint.MODELS)}"
        )
    if options.steps % options.every:
        raise ConfigError(
            f"{options.steps} is not a multiple of {options.every}", where="--steps", hint="Choose a multiple of --every"
        )
    log(f"{options.rounds} rounds of {len(CASES)} times {options.steps} steps on {options.ranks} ranks")
    with tempfile.TemporaryDirectory(prefix="fovea-bench-", dir=directory) as folder:
        result: Result = on_ranks(
            train, options.ranks, command="fovea bench snapshots", options=options, memory=memory, disk=Path(folder)
        )
    return result


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    lines = ["# Snapshots in host memory", "", f"`{command}`", "", *(f"- {n}: {v}" for n, v in machine.items())]
    lines += [
        f"- DINOv2 with {checkpoint.MODELS[options.model]}, {result.parameters / 1e6:.1f} M parameters with its heads; a "
        f"snapshot or checkpoint takes {result.size / 1e6:,.0f} MB in all",
        f"- {options.ranks} ranks of one thread on the CPU, {options.batch} samples each, 2 crops of {options.side} and 4 of "
        f"{options.side // 2} pixels",
        f"- {len(result.seconds[PLAIN])} rounds, in each of them {options.steps} steps of each case in turn; the ratio is of "
        "the same round, ± its 95 % interval",
        "",
        "| | seconds of a step, median | relative to without |",
        "|---|---:|---:|",
    ]
    titles = {
        PLAIN: "without snapshots",
        OFTEN: f"a snapshot every {options.every} steps",
        ALWAYS: "a snapshot every step",
        ON_DISK: f"a checkpoint every {options.every} steps",
    }
    for case, title in titles.items():
        relative = "1" if case == PLAIN else result.ratio(case).times()
        lines.append(f"| {title} | {statistics.median(result.seconds[case]):.3f} | {relative} |")
    step = statistics.median(result.seconds[PLAIN])
    lines += ["", "| training pauses for | median, seconds | 90th percentile | of a step |", "|---|---:|---:|---:|"]
    for kind in KINDS:
        middle, ninth = statistics.median(result.pauses[kind]), _ninth(result.pauses[kind])
        lines.append(f"| a {kind} | {middle:.4f} | {ninth:.4f} | {middle / step:.1%} |")
    lines += [
        "",
        "A pause is the copy to the ranks' own memory, and the wait for a write in progress: with a snapshot every step, each "
        "waits for the one before. What is written beside training takes its time from the cores that train.",
    ]
    return "\n".join(lines) + "\n"


def _ninth(values: Sequence[float]) -> float:
    return sorted(values)[int(0.9 * (len(values) - 1))]
