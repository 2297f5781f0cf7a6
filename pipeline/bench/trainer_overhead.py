"""Benchmarks the overhead of the training loop: the trainer, the engine alone and bare torch, with a minimal model.

The three take turns within one run of the real trainer, whose data come from memory: between two of its steps the other two are
run and timed. Any slowdown of the host therefore affects all three.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.bench.plain import Plain, Size, advance, alone, batch_of, engine_of
from pipeline.checkpoint.writer import Checkpoints
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.runtime.process_group import World
from pipeline.runtime.stop_requests import StopRequests
from pipeline.runtime.watchdog import Watchdog
from pipeline.tracking import Journal
from pipeline.training.progress import Plan, Progress
from pipeline.training.rollback import SkippedSteps
from pipeline.training.schedules import Schedules, constant
from pipeline.training.timing import Phases
from pipeline.training.trainer import Trainer

_WARM = 5
AIM = 1e-3  # seconds per step
_LR = 1e-4


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        steps: measured steps.
        log_every: steps between two lines of the journal.
        size: of the method.
    """

    steps: int = 200
    log_every: int = 10
    size: Size = field(default_factory=Size)


@dataclass(frozen=True)
class Result:
    """CPU seconds of each step.

    Attributes:
        trainer: the whole loop, including journal and synchronization of ranks.
        engine: forward, backward and step of the engine, and the teacher.
        bare: the same in plain torch, without DeepSpeed.
    """

    trainer: list[float]
    engine: list[float]
    bare: list[float]

    @property
    def loop(self) -> float:
        """Overhead of the trainer over the engine, seconds per step, difference of medians."""
        return statistics.median(self.trainer) - statistics.median(self.engine)

    @property
    def deepspeed(self) -> float:
        """Overhead of the engine over plain torch, seconds per step, difference of medians."""
        return statistics.median(self.engine) - statistics.median(self.bare)


class _NullLogger:
    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scores_step: int) -> None: ...

    def log(self, text: str) -> None: ...


class _Turns:
    """A stream from memory that times the step between its batches, and runs the other cases in turn."""

    def __init__(self, batch: Batch, last: int, others: dict[str, Callable[[], None]]) -> None:
        self._batch, self._last, self._others = batch, last, others
        self.seconds: dict[str, list[float]] = {"trainer": [], **{name: [] for name in others}}
        self.seconds_waited = 0.0
        self.usage: dict[str, float] = {}

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        for number in range(self._last):
            begin = time.process_time()
            yield number, [self._batch]
            spent = {"trainer": time.process_time() - begin}
            for name, act in self._others.items():
                begin = time.process_time()
                act()
                spent[name] = time.process_time() - begin
            if number >= _WARM:
                for name, value in spent.items():
                    self.seconds[name].append(value)

    def close(self) -> None: ...


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Train the smallest method with the real trainer on one rank on the CPU."""
    size, batch = options.size, batch_of(options.size)
    with alone() as folder:
        method, twin, other = Plain(size), Plain(size), Plain(size)
        engine, twins = engine_of(method, size), engine_of(twin, size)
        at = Step(lr=_LR, last_layer_lr=_LR, momentum=0.99)
        others = {"engine": lambda: advance(twins, twin, batch, at), "bare": _bare(other, batch, at)}
        steps = _WARM + options.steps
        turns: Any = _Turns(batch, steps, others)
        world = World(0, 1, 0, torch.device("cpu"), None)
        watchdog = Watchdog(folder / "logs", 0, 1)
        journal = Journal(folder / "journal.jsonl")

        def never() -> Progress:
            raise AssertionError("nothing to roll back to")

        trainer = Trainer(
            world=world,
            method=method,
            engine=engine,
            schedules=Schedules(size.samples, 1000 * size.samples, constant(_LR), constant(0.0), constant(0.99)),
            stream=lambda first, last: turns,
            checkpoints=Checkpoints(folder / "checkpoints", keep_last=1),
            evaluate=None,
            data_state=lambda: {"seen": 0, "substituted": {}, "counts": {}, "samples": 0, "fingerprint": "", "quarantine": {}},
            manifest_fields={"config": {}},
            journal=journal,
            logger=_NullLogger(),
            plan=Plan(steps, options.log_every, 0, 0, 3, seed=0),
            requests=StopRequests(folder),
            phases=Phases(world, watchdog),
            skipped_steps=SkippedSteps(folder / "skipped_steps.json"),
            load_last_checkpoint=never,
        )
        log(f"{steps} steps, three times")
        watchdog.start()
        try:
            trainer.run()
        finally:
            watchdog.stop()
            journal.close()
        engine.close()
        twins.close()
    return Result(**turns.seconds)


def _bare(method: Plain, batch: Batch, at: Step) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(method.parameters(), lr=_LR)

    def act() -> None:
        torch.stack(list(method(batch, at).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(at)

    return act


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    lines = ["# Overhead of the training loop per step", "", f"`{command}`", "", *(f"- {n}: {v}" for n, v in machine.items())]
    s = options.size
    lines += [
        f"- {s.depth} layers of {s.width}, {s.samples} samples, one rank, {options.steps} steps, logged every {options.log_every}"
    ]
    lines += ["", "| | CPU ms, median | 90th percentile |", "|---|---:|---:|"]
    for name in ("bare", "engine", "trainer"):
        values = sorted(getattr(result, name))
        lines.append(f"| {name} | {statistics.median(values) * 1e3:.2f} | {values[int(0.9 * (len(values) - 1))] * 1e3:.2f} |")
    comparison = "within" if result.loop <= AIM else "above"
    lines += [
        "",
        f"The loop adds {result.loop * 1e3:.2f} ms to the engine's step, {comparison} the {AIM * 1e3:.0f} ms targeted; "
        f"DeepSpeed adds {result.deepspeed * 1e3:.2f} ms to plain torch.",
    ]
    return "\n".join(lines) + "\n"
