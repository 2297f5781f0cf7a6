"""The training loop, independent of the method.

Order of one step: schedules, batch, teacher and student forward, loss terms, finite check, backward, step, after_step, log,
evaluate, checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.writer import Checkpoints, Outcome
from pipeline.data.augment.views import Batch
from pipeline.data.loader.batch_stream import BatchStream
from pipeline.data.order.random import mix
from pipeline.errors import NonFiniteError, TrainingError
from pipeline.methods.base import Method, Step
from pipeline.runtime.process_group import World
from pipeline.runtime.stop_requests import Stop, StopRequests
from pipeline.runtime.watchdog import CHECKPOINT, COMPUTE, DATA, END, EVALUATE, LOG, STEP, TEACHER
from pipeline.tracking import Journal
from pipeline.training.alerts import Alerts
from pipeline.training.engine import Engine
from pipeline.training.rollback import SkippedSteps
from pipeline.training.schedules import Schedules
from pipeline.training.timing import Phases, memory_now


@dataclass(frozen=True)
class Plan:
    """Start, end and intervals of a run, in optimizer steps.

    Attributes:
        steps: the step at which the run is finished.
        log_every, evaluate_every, checkpoint_every: intervals, 0 for never.
        max_nonfinite: consecutive non-finite steps that stop the run.
        seed: the run's seed.
        record: file for each step's keys and loss terms of this rank, or ``None``.
        rollback_after: consecutive non-finite steps that trigger a rollback to the last checkpoint, ``None`` for never.
        rollback_margin: steps before them that are skipped as well.
        max_rollbacks: maximum number of rollbacks.
        asynchronous: whether checkpoints are written while training continues.
        save_evaluated: metric after whose measurement a checkpoint is saved, so that the best one can be kept.
    """

    steps: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    max_nonfinite: int
    seed: int
    record: Path | None = None
    rollback_after: int | None = None
    rollback_margin: int = 0
    max_rollbacks: int = 0
    asynchronous: bool = False
    save_evaluated: str | None = None


@dataclass
class Progress:
    """Progress of a run, saved in checkpoints beside the tensors.

    Attributes:
        step: steps done, which is also the number of the next one.
        applied: steps whose gradients were applied.
        skipped: steps skipped because of a non-finite loss or gradient.
        scores: the latest evaluation, by metric.
        scored: step of that evaluation, -1 for none.
        judged: metrics measured at that step; others in ``scores`` are older.
        seconds: wall time that advanced training, over all attempts.
    """

    step: int = 0
    applied: int = 0
    skipped: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    scored: int = -1
    judged: tuple[str, ...] = ()
    seconds: float = 0.0


class ProgressLogger(Protocol):
    """Displays progress; a no-op except on rank 0."""

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scored: int) -> None:
        """Called after a logged step: steps done and in total, loss, images per second, latest scores and their step."""
        ...

    def log(self, text: str) -> None:
        """Print one line."""
        ...


@dataclass
class Trainer:
    """Trains on one rank; built by :func:`pipeline.training.build.assemble`.

    Attributes:
        world: this rank's position in the process group.
        method: the method.
        engine: the DeepSpeed engine of the method.
        schedules: learning rate and other schedules.
        stream: opens the batches from a given step.
        checkpoints: where to save.
        evaluate: runs the evaluations that are due at a step, given the seconds of training, on all ranks, and returns their
            scores.
        data_state: the data side's part of a checkpoint, gathered from all ranks.
        facts: constant parts of every checkpoint's manifest.
        journal: rank 0's metrics journal, ``None`` on other ranks.
        logger: rank 0's progress display.
        plan: length and intervals of the run.
        requests: stop requests (signals).
        phases: reports the rank's current phase and measures time.
        skipped_steps: steps that are not trained on.
        go_back: loads the last checkpoint on all ranks.
        alarms: detects collapse, divergence and plateaus.
        machines: utilization of each node; called by all ranks.
        progress: the current progress.
        data_counts: samples seen, substituted and available, as of the last checkpoint.
    """

    world: World
    method: Method
    engine: Engine
    schedules: Schedules
    stream: Callable[[int, int], BatchStream]
    checkpoints: Checkpoints
    evaluate: Callable[[int, float], dict[str, float]] | None
    data_state: Callable[[], dict[str, Any]]
    facts: dict[str, Any]
    journal: Journal | None
    logger: ProgressLogger
    plan: Plan
    requests: StopRequests
    phases: Phases
    skipped_steps: SkippedSteps
    go_back: Callable[[], Progress]
    alarms: Alerts = field(default_factory=Alerts)
    machines: Callable[[], dict[str, float]] = dict
    progress: Progress = field(default_factory=Progress)
    data_counts: dict[str, Any] = field(default_factory=dict)
    _seconds_before: float = 0.0
    _went_back: bool = False

    def run(self) -> Stop:
        """Train until the planned number of steps is reached or all ranks agree to stop; either way a checkpoint is saved.

        Raises:
            TrainingError: too many consecutive non-finite steps, or too many bad samples.
            CheckpointError: the last checkpoint could not be written, or too many consecutive saves failed.
        """
        try:
            return self._run()
        finally:
            self.checkpoints.close()

    def _run(self) -> Stop:
        p = self.progress
        self._seconds_before = p.seconds  # earlier attempts did not wait for this one's data
        meter = _Meter(self.world)
        in_a_row = 0
        saved_at = p.step if p.step else -1
        if p.step == 0 and self.evaluate is not None:
            self._evaluate()
        stop = self.requests.agreed(self.world.control)
        self.phases.enter(DATA, p.step)
        begin = time.perf_counter()
        with self.plan.record.open("a", buffering=1) if self.plan.record else nullcontext() as record:
            for number, micro_batches, batches in self._batches():
                if number != p.step:
                    raise TrainingError(
                        f"the data loader delivered step {number} instead of {p.step}",
                        where=f"rank {self.world.rank}",
                        hint="Report this as a bug of fovea",
                    )
                if number in self.skipped_steps:
                    p.step += 1
                    p.skipped += 1
                    continue
                step = self.schedules.at(p.step * self.schedules.global_batch)
                # The method's random draws on the device depend only on step and rank, so that no random state has to be saved.
                drawn = [mix(self.plan.seed, 0x57E9, number, self.world.rank, i)[0] for i in range(len(micro_batches))]
                micro_batches = [replace(batch, seed=seed) for batch, seed in zip(micro_batches, drawn, strict=True)]

                self.phases.enter(COMPUTE)
                size = micro_batches[0].sides
                self.phases.counted(self.engine.before_accumulation, 1, size)(micro_batches, step)
                forward_backward = self.phases.counted(self.engine.forward_backward, len(micro_batches), size)
                terms = _mean([forward_backward(batch, step) for batch in micro_batches])
                finite = torch.stack(list(terms.values())).isfinite().all()
                self.phases.enter(STEP)
                applied, norms = self.engine.step(step, finite)
                self.phases.enter(TEACHER)
                if applied:
                    self.method.after_step(step)
                else:
                    self.method.on_step_skipped()
                self.phases.enter(LOG)

                p.step += 1
                p.applied += applied
                p.skipped += not applied
                in_a_row = 0 if applied else in_a_row + 1
                p.seconds += time.perf_counter() - begin
                begin = time.perf_counter()
                if record is not None:
                    record.write(json.dumps(_line(number, micro_batches, terms, applied)) + "\n")
                if not applied:
                    self._skipped(number, micro_batches, terms, in_a_row)
                    if in_a_row == self.plan.rollback_after and self.skipped_steps.rollbacks < self.plan.max_rollbacks:
                        self._rewind(number, in_a_row)
                        in_a_row, saved_at = 0, p.step
                        continue
                meter.add(terms, self.method.metrics if applied else {}, self.schedules.global_batch)
                if _due(p.step, self.plan.log_every, self.plan.steps):
                    self._log(step, meter, norms, batches)
                if self.evaluate is not None and _due(p.step, self.plan.evaluate_every, self.plan.steps):
                    self._evaluate()
                stop = self.requests.agreed(self.world.control, self.checkpoints.state)
                self._report_outcome(self.checkpoints.poll(self.requests.saving))
                evaluated = p.scored == p.step and self.plan.save_evaluated in p.judged
                if stop or evaluated or self.requests.save or _due(p.step, self.plan.checkpoint_every, self.plan.steps):
                    saved_at = self._save(beside=self.plan.asynchronous and not stop and p.step < self.plan.steps)
                if stop:
                    break
                self.phases.enter(DATA, p.step)
                begin = time.perf_counter()
        self.phases.enter(END)
        if saved_at != p.step:
            self._save()
        self._report_outcome(self.checkpoints.finish())
        return stop or Stop.FINISHED

    def _batches(self) -> Iterator[tuple[int, list[Batch], BatchStream]]:
        """Batches from the next step on, with their stream; reopened after each rollback."""
        going = True
        while going:
            self._went_back = False
            batches = self.stream(self.progress.step, self.plan.steps)
            try:
                for number, micro_batches in batches:
                    yield number, micro_batches, batches
                    if self._went_back:
                        break
            finally:
                batches.close()
            going = self._went_back

    def _rewind(self, number: int, in_a_row: int) -> None:
        """Roll back to the last checkpoint. All ranks do so at the same time, since all have skipped the same steps."""
        p, first = self.progress, max(number - in_a_row + 1 - self.plan.rollback_margin, 0)
        self.skipped_steps.add(first, number, write=self.world.rank == 0)
        with self.phases.phase(CHECKPOINT):
            self._report_outcome(self.checkpoints.finish())
            before = self.go_back()
        p.step, p.applied, p.skipped, p.scores = before.step, before.applied, before.skipped, before.scores
        self._went_back = True
        self.phases.enter(DATA, p.step)
        if self.world.rank == 0:
            self.logger.log(f"back to step {p.step}; steps {first} to {number} are left out from now on")
        if self.journal is not None:
            self.journal.metrics(p.step, {"train/rollbacks": float(self.skipped_steps.rollbacks)})

    def _skipped(self, number: int, batches: list[Batch], terms: dict[str, Tensor], in_a_row: int) -> None:
        bad = [name for name, term in terms.items() if not bool(term.isfinite())] or ["gradient"]
        keys = [key for batch in batches for key in batch.keys]
        self.logger.log(f"step {number}: {', '.join(bad)} not finite, step skipped; rank {self.world.rank} held {keys[:4]}…")
        if self.journal is not None:
            self.journal.metrics(number, {"train/skipped_steps": float(self.progress.skipped)})
        rollbacks = self.plan.rollback_after is not None and self.skipped_steps.rollbacks < self.plan.max_rollbacks
        if in_a_row >= self.plan.max_nonfinite and not rollbacks:
            # All ranks reach this point together; the message names the samples of the rank with non-finite terms.
            gathered: list[tuple[int, list[str], list[str]]] = [(0, [], [])] * self.world.size
            dist.all_gather_object(gathered, (self.world.rank, bad, keys[:4]), group=self.world.control)
            rank, terms_there, keys_there = next((f for f in gathered if f[1] != ["gradient"]), gathered[0])
            raise NonFiniteError(
                f"{in_a_row} steps in a row were not finite ({', '.join(terms_there)})",
                where=f"step {number}, first keys on rank {rank}: {keys_there}",
                hint="Lower schedule.lr.peak or optim.betas, lengthen schedule.lr.warmup, or train.precision=fp32; then resume",
            )

    def _log(self, step: Step, meter: _Meter, norms: dict[str, Tensor], batches: BatchStream) -> None:
        values = meter.flush()
        p = self.progress
        rate = values.pop("rate")
        seconds, machines = self.phases.read(), self.machines()
        if self.journal is not None:
            share = batches.seconds_waited / max(p.seconds - self._seconds_before, 1e-9)
            self.journal.metrics(
                p.step,
                {
                    **{f"train/{name}": value for name, value in values.items()},
                    **{f"gradient_norm/{name}": float(norm) for name, norm in norms.items()},
                    "train/lr": step.lr,
                    "train/weight_decay": step.weight_decay,
                    "train/teacher_momentum": step.momentum,
                    "train/teacher_temperature": step.teacher_temperature,
                    "train/epoch": step.epoch,
                    "perf/samples_seen": float(p.step * self.schedules.global_batch),
                    "perf/images_per_second": rate,
                    "perf/data_wait_fraction": share,
                    **{f"perf/{name}": value for name, value in seconds.items()},
                    **self._memory(),
                    **{f"system/{name}": value for name, value in machines.items()},
                    "train/skipped_steps": float(p.skipped),
                    **{f"storage/{name}": value for name, value in batches.usage.items()},
                },
            )
        self.logger.step(p.step, self.plan.steps, values["loss"], rate, p.scores, p.scored)
        if self.world.rank == 0:
            for alarm in self.alarms.look(step, p.step, values):
                self.logger.log(f"step {p.step}: {alarm.text}")
                if self.journal is not None:
                    self.journal.metrics(p.step, {f"alert/{alarm.failure_mode}": float(alarm.since)})
                    self.journal.tags({f"alert/{alarm.failure_mode}": f"step {p.step}: {alarm.text}"})

    def _memory(self) -> dict[str, float]:
        parts = self.engine.memory()
        now = memory_now(self.world.device)
        if "peak" in now:
            here = sum(size for name, size in parts.items() if name != "host")
            now["activations_peak"] = max(now["peak"] - here, 0.0)
        return {f"memory/{name}_gb": size / 1e9 for name, size in (parts | now).items()}

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        with self.phases.phase(EVALUATE):
            scores = self.evaluate(self.progress.step, self.progress.seconds)
        if not scores:
            return
        self.progress.scores.update(scores)
        self.progress.scored, self.progress.judged = self.progress.step, tuple(scores)
        if self.journal is not None:
            self.journal.metrics(self.progress.step, scores)

    def _save(self, *, beside: bool = False) -> int:
        with self.phases.phase(CHECKPOINT):
            return self._write(beside)

    def _write(self, beside: bool) -> int:
        p = self.progress
        facts = {
            **self.facts,
            "step": p.step,
            "applied": p.applied,
            "skipped": p.skipped,
            "samples_seen": p.step * self.schedules.global_batch,
            "scores": dict(p.scores),
            "scored": p.scored,
            "judged": list(p.judged),
            "seconds": p.seconds,
            "data": self.data_state(),
        }
        data = facts["data"]
        self.data_counts = {name: data[name] for name in ("seen", "substituted", "counts", "samples", "fingerprint")}
        if beside:
            self._report_outcome(self.checkpoints.begin(self.engine, self.method, facts))
        else:
            self._report_outcome(self.checkpoints.finish())
            self._report_outcome(Outcome(p.step, self.checkpoints.save(self.engine, self.method, facts)))
        if self.journal is not None:
            substituted = {f"substituted/{reason}": count for reason, count in data["substituted"].items()}
            counts = {"seen": data["seen"], "quarantined": len(data["quarantine"]), **substituted, **data["counts"]}
            self.journal.metrics(p.step, {f"data/{name}": float(count) for name, count in counts.items()})
        return p.step

    def _report_outcome(self, outcome: Outcome | None) -> None:
        """Print and record the outcome of a save."""
        if outcome is None or self.journal is None:
            return
        if outcome.problem is None:
            samples = outcome.step * self.schedules.global_batch
            self.journal.tags({"fovea.checkpoint": outcome.path, "fovea.samples_seen": samples})
        else:
            self.logger.log(f"no checkpoint of step {outcome.step}: {outcome.problem}; training continues")
        self.journal.metrics(outcome.step, {"checkpoint/failures_in_a_row": float(outcome.in_a_row)})
        self.journal.sync()


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _mean(terms: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([t[name] for t in terms]).mean() for name in terms[0]}


def _line(step: int, batches: list[Batch], terms: dict[str, Tensor], applied: bool) -> dict[str, Any]:
    keys = [key for batch in batches for key in batch.keys]
    pixels = hashlib.blake2b(digest_size=8)
    for batch in batches:
        for views in batch.views.values():
            for view in views:
                pixels.update(view.cpu().numpy().tobytes())
    return {
        "step": step,
        "keys": keys,
        "sides": batches[0].sides,
        "pixels": pixels.hexdigest(),
        "terms": {name: float(term).hex() for name, term in terms.items()},
        "applied": applied,
    }


class _Meter:
    """Means since the last log line, kept on the device and averaged over ranks only when read."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._samples, self._since = 0, time.perf_counter()

    def add(self, terms: dict[str, Tensor], metrics: dict[str, Tensor], samples: int) -> None:
        total = torch.stack(list(terms.values())).sum()
        for name, value in {"loss": total, **terms, **metrics}.items():
            self._sums[name] = self._sums[name] + value.detach().float() if name in self._sums else value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._samples += samples

    def flush(self) -> dict[str, float]:
        names = sorted(self._sums)
        means = torch.stack([self._sums[n] / self._counts[n] for n in names])
        dist.all_reduce(means)
        means /= self._world.size
        now = time.perf_counter()
        rate = self._samples / max(now - self._since, 1e-9)
        self._sums, self._counts, self._samples, self._since = {}, {}, 0, now
        return {**dict(zip(names, means.tolist(), strict=True)), "rate": rate}
