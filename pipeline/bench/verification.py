"""Benchmarks verified steps (``train.verify_every``): their CPU time beside that of others, in a real small training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.bench.signatures import CONFIG, small_training
from pipeline.data.augment.views import Batch
from pipeline.errors import ConfigError
from pipeline.methods.base import Step
from pipeline.training.verification import StepResult

_WARM = 4


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        steps: measured steps; every second one is verified.
        batch: samples of a step.
        workers: reader processes.
    """

    steps: int = 40
    batch: int = 64
    workers: int = 1


@dataclass(frozen=True)
class Result:
    """CPU seconds of the training thread of each step: those that were verified, and the others."""

    verified: list[float]
    plain: list[float]

    @property
    def ratio(self) -> float:
        """Time of a verified step relative to another one, quotient of medians."""
        return statistics.median(self.verified) / statistics.median(self.plain)


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Train on one rank on the CPU, with one thread; verified steps and others alternate.

    Raises:
        ConfigError: no step is verified.
    """
    steps = _WARM + options.steps
    seconds: dict[bool, list[float]] = {True: [], False: []}
    settings = ["train.verify_every=2", f"data.num_workers={options.workers}"]
    with small_training(steps, options.batch, settings) as (trainer, _):
        if (verification := trainer.verification) is None:
            raise ConfigError("no step is verified", where="train.verify_every", hint="Give a number of steps")
        # The digests of the state before a verified step are taken at the end of the step before, and count for the verified one.
        digests: list[float] = []
        original, digest_state, due = trainer._verified_step, verification.digest_state, verification.due

        def timed_digests(following: int) -> None:
            begin = time.thread_time()
            digest_state(following)
            digests.append(time.thread_time() - begin)

        def timed(step: Step, micro_batches: list[Batch]) -> StepResult:
            begin, before = time.thread_time(), digests[-1] if digests else 0.0
            result = original(step, micro_batches)
            own = time.thread_time() - begin - digests[-1]
            seconds[due(step.index)].append(own + (before if due(step.index) else 0.0))
            return result

        verification.digest_state = timed_digests  # type: ignore[method-assign]
        trainer._verified_step = timed  # type: ignore[method-assign]
        log(f"{steps} steps of {options.batch} samples, every second one verified")
        trainer.run()
    return Result(seconds[True][_WARM // 2 :], seconds[False][_WARM // 2 :])


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    lines = ["# Verified steps", "", f"`{command}`", "", *(f"- {n}: {v}" for n, v in machine.items())]
    lines += [
        f"- {CONFIG} on synthetic scenes, {options.batch} samples, one rank of one thread, {options.steps} steps in one run"
    ]
    lines += ["", "| step | median CPU time, ms | 90th percentile |", "|---|---:|---:|"]
    for name, values in (("other", result.plain), ("verified", result.verified)):
        ordered = sorted(values)
        lines.append(f"| {name} | {statistics.median(ordered) * 1e3:.1f} | {ordered[int(0.9 * (len(ordered) - 1))] * 1e3:.1f} |")
    share = {every: 100 * (result.ratio - 1) / every for every in (10, 100, 1000)}
    lines += [
        "",
        f"A verified step takes {result.ratio:.2f} times as long as another one. The run becomes slower by "
        + ", ".join(f"{percent:.2g} % with `train.verify_every={every}`" for every, percent in share.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"
