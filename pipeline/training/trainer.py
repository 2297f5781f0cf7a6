"""Training loop: forward, backward, optimizer step, teacher update, logging, evaluation and checkpoints for any method.

Order of one step: batch, schedules, teacher forward on all micro-batches (``before_accumulation``), student forward and
backward per micro-batch, finite check, optimizer step, ``after_step``, record, log, evaluate, agreement on stopping and saving,
checkpoint.

On a GPU the host queues a step without waiting for it, so whether it was applied is read one step later, and everything that
depends on it (record, counts, skips, rollbacks, means) happens then. Before it logs, evaluates or saves, the loop settles all
steps; a step queued behind one that triggers a rollback leaves no trace.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.memory import Snapshots
from pipeline.checkpoint.writer import Checkpoints, Outcome
from pipeline.data.augment.views import Batch
from pipeline.data.loader.batch_stream import BatchStream
from pipeline.errors import CorruptionError, NonFiniteError, TrainingError
from pipeline.methods.base import Method, Step
from pipeline.runtime.process_group import World
from pipeline.runtime.startup_phases import FIRST_STEP, StartupPhases
from pipeline.runtime.stop_requests import Stop, StopRequests
from pipeline.runtime.watchdog import CHECKPOINT, COMPUTE, DATA, END, EVALUATE, LOG, STEP, TEACHER
from pipeline.tracking import Journal
from pipeline.training.alerts import Alerts
from pipeline.training.applied import Applied
from pipeline.training.engine import Engine
from pipeline.training.progress import Plan, Progress, ProgressLogger
from pipeline.training.queued_steps import Meter, QueuedStep, record_line
from pipeline.training.rollback import SkippedSteps
from pipeline.training.schedules import Schedules
from pipeline.training.signatures import Signatures
from pipeline.training.timing import Phases, memory_now
from pipeline.training.verification import Verification


@dataclass
class _Bookkeeping:
    """Steps whose bookkeeping is not done yet, and where it goes; ``record`` is the open file of ``Plan.record``."""

    meter: Meter
    record: IO[str] | None
    queued: deque[QueuedStep] = field(default_factory=deque)
    consecutive_skipped: int = 0


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
        manifest_fields: constant parts of every checkpoint's manifest.
        journal: rank 0's metrics journal, ``None`` on other ranks.
        logger: rank 0's progress display.
        plan: length and intervals of the run.
        requests: stop requests (signals).
        phases: reports the rank's current phase and measures time.
        skipped_steps: steps that are not trained on.
        load_last_checkpoint: loads the last checkpoint on all ranks.
        alerts: detects collapse, divergence and plateaus.
        node_metrics: utilization of each node; called by all ranks.
        signatures: records each step's signature, ``None`` for none.
        snapshots: the snapshots in host memory.
        only_in_memory: whether the run continues from a snapshot; a checkpoint is then saved at once.
        verification: does some steps twice to find silent corruption, ``None`` for never.
        progress: the current progress.
        data_counts: samples seen, substituted and available, as of the last checkpoint.
        startup: when the phases of the start have ended.
    """

    world: World
    method: Method
    engine: Engine
    schedules: Schedules
    stream: Callable[[int, int], BatchStream]
    checkpoints: Checkpoints
    evaluate: Callable[[int, float], dict[str, float]] | None
    data_state: Callable[[], dict[str, Any]]
    manifest_fields: dict[str, Any]
    journal: Journal | None
    logger: ProgressLogger
    plan: Plan
    requests: StopRequests
    phases: Phases
    skipped_steps: SkippedSteps
    load_last_checkpoint: Callable[[], Progress]
    alerts: Alerts = field(default_factory=Alerts)
    node_metrics: Callable[[], dict[str, float]] = dict
    signatures: Signatures | None = None
    snapshots: Snapshots = field(default_factory=Snapshots)
    only_in_memory: bool = False
    verification: Verification | None = None
    progress: Progress = field(default_factory=Progress)
    data_counts: dict[str, Any] = field(default_factory=dict)
    startup: StartupPhases = field(default_factory=StartupPhases)
    _seconds_before: float = 0.0
    _rolled_back: bool = False

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
            self.snapshots.close()
            if self.signatures is not None:
                self.signatures.close()

    def _run(self) -> Stop:
        """The loop over steps; see the module for the order of one step."""
        progress = self.progress
        self._seconds_before = progress.seconds  # earlier attempts did not wait for this one's data
        saved_at = progress.step if progress.step else -1  # a resumed run that trains no further step has its checkpoint already
        if progress.step == 0 and self.evaluate is not None:
            self._evaluate()
        if self.only_in_memory:
            saved_at = self._save(asynchronous=self.plan.asynchronous and progress.step < self.plan.steps)
        stop = self.requests.agreed(self.world.control)
        self.phases.enter(DATA, progress.step)
        self.startup.mark("trainer")
        step_start = time.perf_counter()
        with self.plan.record.open("a", buffering=1) if self.plan.record else nullcontext() as record:
            bookkeeping = _Bookkeeping(Meter(self.world), record)
            for step_index, micro_batches, batches in self._batches():
                if step_index != progress.step:
                    raise TrainingError(
                        f"the data loader delivered step {step_index} instead of {progress.step}",
                        where=f"rank {self.world.rank}",
                        hint="Report this as a bug of fovea",
                    )
                if step_index in self.skipped_steps:
                    if self._settle(bookkeeping):
                        saved_at = progress.step
                        continue
                    progress.step += 1
                    progress.skipped += 1
                    continue
                self.startup.mark("first batch")
                step = self.schedules.at(progress.step * self.schedules.global_batch)
                # The method's random draws on the device depend only on step and rank, so that no random state has to be saved.
                seeds = self.plan.device_seeds(step_index, self.world.rank, len(micro_batches))
                micro_batches = [replace(batch, seed=seed) for batch, seed in zip(micro_batches, seeds, strict=True)]
                terms, applied, norms = self._verified_step(step, micro_batches)
                self.phases.enter(LOG)

                progress.step += 1
                progress.seconds += time.perf_counter() - step_start
                self.startup.mark(FIRST_STEP)
                step_start = time.perf_counter()  # a rollback continues without reaching the end of the loop
                line = record_line(step_index, micro_batches, terms) if record is not None else None
                keys = [key for batch in micro_batches for key in batch.keys]
                signature = self.signatures.take(step, micro_batches, terms, norms) if self.signatures is not None else None
                bookkeeping.queued.append(
                    QueuedStep(step_index, applied, keys, terms, dict(self.method.metrics), line, signature)
                )
                log = _due(progress.step, self.plan.log_every, self.plan.steps)
                pause = progress.step == self.plan.pause_at
                due = pause or _due(progress.step, self.plan.evaluate_every, self.plan.steps)
                evaluate = self.evaluate is not None and due
                save = _due(progress.step, self.plan.checkpoint_every, self.plan.steps)
                snapshot = self.snapshots.due(progress.step, self.plan.steps)
                last = progress.step == self.plan.steps
                at_once = applied.on_device is None or log or evaluate or save or snapshot or pause or last
                if self._settle(bookkeeping, keep=0 if at_once else 1):
                    saved_at = progress.step
                    continue
                if log:
                    self._log(step, bookkeeping.meter, norms, batches)
                if evaluate:
                    self._evaluate()
                # One all-reduce per step carries stop requests, save requests and the states of saves in progress: its cost is
                # its latency, and all ranks decide on the same values.
                stop = self.requests.agreed(self.world.control, self.checkpoints.state, self.snapshots.state)
                if pause and progress.step < self.plan.steps:
                    stop = stop or Stop.USER_REQUEST
                self._report_outcome(self.checkpoints.poll(self.requests.saving))
                self._report_snapshot(self.snapshots.poll(self.requests.snapshot))
                if snapshot and not stop:
                    self._take_snapshot()
                evaluated = progress.scores_step == progress.step and self.plan.save_evaluated in progress.evaluated_metrics
                if stop or evaluated or self.requests.save or save:
                    if self._settle(bookkeeping):
                        saved_at = progress.step
                    else:
                        saved_at = self._save(
                            asynchronous=self.plan.asynchronous and not stop and progress.step < self.plan.steps
                        )
                if stop:
                    break
                self.phases.enter(DATA, progress.step)
                step_start = time.perf_counter()  # logging, evaluation and checkpoints do not count as training
        self.phases.enter(END)
        if saved_at != progress.step:
            self._save()
        self._report_snapshot(self.snapshots.finish())
        self._report_outcome(self.checkpoints.finish())
        return stop or Stop.FINISHED

    def _settle(self, books: _Bookkeeping, *, keep: int = 0) -> bool:
        """Find out which queued steps were applied, all but the ``keep`` newest, and record, count and report them.

        Returns:
            Whether the run was rolled back to the last checkpoint; steps queued since are then forgotten.
        """
        progress = self.progress
        while len(books.queued) > keep:
            done = books.queued.popleft()
            applied = bool(done.applied)
            progress.applied += applied
            progress.skipped += not applied
            books.consecutive_skipped = 0 if applied else books.consecutive_skipped + 1
            if books.record is not None and done.line is not None:
                books.record.write(json.dumps({**done.line, "applied": applied}) + "\n")
            if self.signatures is not None and done.signature is not None:
                self.signatures.settle(done.signature, applied=applied, wait=keep == 0)
            if not applied:
                self._report_skipped_step(done, books.consecutive_skipped)
                rollbacks_left = self.skipped_steps.rollbacks < self.plan.max_rollbacks
                if books.consecutive_skipped == self.plan.rollback_after and rollbacks_left:
                    self._roll_back(done.index, books.consecutive_skipped)
                    books.consecutive_skipped = 0
                    books.queued.clear()
                    return True
            books.meter.add(done.terms, done.metrics if applied else {}, self.schedules.global_batch)
        return False

    def _verified_step(self, step: Step, micro_batches: list[Batch]) -> tuple[dict[str, Tensor], Applied, dict[str, Tensor]]:
        """A step as :meth:`_train_step`, done twice if it is to be verified.

        Raises:
            CorruptionError: on all ranks, if it was not the same twice.
        """
        if self.verification is None:
            return self._train_step(step, micro_batches)
        try:
            if self.verification.due(step.index):
                result = self.verification.twice(step, micro_batches, self._train_step)
            else:
                result = self._train_step(step, micro_batches)
        except CorruptionError as error:
            self.logger.log(f"step {step.index}: {error}")
            if self.journal is not None:
                self.journal.metrics(step.index, {"alert/corruption": float(step.index)})
                self.journal.tags({"alert/corruption": str(error)})
                self.journal.sync()
            raise
        self.verification.digest_state(step.index + 1)
        return result

    def _train_step(self, step: Step, micro_batches: list[Batch]) -> tuple[dict[str, Tensor], Applied, dict[str, Tensor]]:
        """Teacher, student, backward, optimizer step and teacher update.

        Returns:
            Loss terms, means over the micro-batches; whether the step was applied; gradient norms.
        """
        self.phases.enter(COMPUTE)
        layout = micro_batches[0].layout
        self.phases.counted(self.engine.before_accumulation, 1, layout)(micro_batches, step)
        forward_backward = self.phases.counted(self.engine.forward_backward, len(micro_batches), layout)
        terms = _mean([forward_backward(batch, step) for batch in micro_batches])
        finite = torch.stack(list(terms.values())).isfinite().all()
        self.phases.enter(STEP)
        applied, norms = self.engine.step(step, finite)
        self.phases.enter(TEACHER)
        if applied.on_device is not None:
            self.method.after_step(step, applied.on_device)
        elif applied:
            self.method.after_step(step)
        else:
            self.method.on_step_skipped()
        return terms, applied, norms

    def _batches(self) -> Iterator[tuple[int, list[Batch], BatchStream]]:
        """Batches from the next step on, with their stream; reopened after each rollback."""
        reopen = True
        while reopen:
            self._rolled_back = False
            batches = self.stream(self.progress.step, self.plan.steps)
            try:
                for step_index, micro_batches in batches:
                    yield step_index, micro_batches, batches
                    if self._rolled_back:
                        break
            finally:
                batches.close()
            reopen = self._rolled_back

    def _roll_back(self, step_index: int, consecutive_skipped: int) -> None:
        """Roll back to the last checkpoint. All ranks do so at the same time, since all have skipped the same steps."""
        progress = self.progress
        with self.phases.phase(CHECKPOINT):
            self.snapshots.discard()  # before the steps are noted: a snapshot may have learnt from them
            self._report_outcome(self.checkpoints.finish())
            restored = self.load_last_checkpoint()
            if self.verification is not None:
                self.verification.forget()
        # Steps before the checkpoint cannot be left out: its weights contain them.
        first = max(step_index - consecutive_skipped + 1 - self.plan.rollback_margin, restored.step)
        self.skipped_steps.add(first, step_index, write=self.world.rank == 0)
        progress.step, progress.applied, progress.skipped = restored.step, restored.applied, restored.skipped
        progress.scores = restored.scores
        self._rolled_back = True
        self.phases.enter(DATA, progress.step)
        if self.world.rank == 0:
            self.logger.log(f"back to step {progress.step}; steps {first} to {step_index} are left out from now on")
        if self.journal is not None:
            self.journal.metrics(progress.step, {"train/rollbacks": float(self.skipped_steps.rollbacks)})

    def _report_skipped_step(self, skipped: QueuedStep, consecutive_skipped: int) -> None:
        """Print and record a skipped step.

        Raises:
            NonFiniteError: on all ranks, if there are too many in a row and no rollback is left.
        """
        step_index, keys = skipped.index, skipped.keys
        bad = [name for name, term in skipped.terms.items() if not bool(term.isfinite())] or ["gradient"]
        self.logger.log(f"step {step_index}: {', '.join(bad)} not finite, step skipped; rank {self.world.rank} held {keys[:4]}…")
        if self.journal is not None:
            self.journal.metrics(step_index, {"train/skipped_steps": float(self.progress.skipped)})
        rollbacks = self.plan.rollback_after is not None and self.skipped_steps.rollbacks < self.plan.max_rollbacks
        if consecutive_skipped >= self.plan.max_nonfinite and not rollbacks:
            # All ranks reach this point together; the message names the samples of the rank with non-finite terms.
            gathered: list[tuple[int, list[str], list[str]]] = [(0, [], [])] * self.world.size
            dist.all_gather_object(gathered, (self.world.rank, bad, keys[:4]), group=self.world.control)
            rank, terms_there, keys_there = next((f for f in gathered if f[1] != ["gradient"]), gathered[0])
            raise NonFiniteError(
                f"{consecutive_skipped} steps in a row were not finite ({', '.join(terms_there)})",
                where=f"step {step_index}, first keys on rank {rank}: {keys_there}",
                hint="Start a new run with init_from.source=<this run> and a lower schedule.lr.peak, a longer schedule.lr.warmup "
                "or train.precision=fp32; or resume with watchdog.rollback_after, which skips such steps",
            )

    def _log(self, step: Step, meter: Meter, norms: dict[str, Tensor], batches: BatchStream) -> None:
        """Record and print the means since the last log line, and the alerts due; collective."""
        values = meter.flush()
        progress = self.progress
        rate = values.pop("rate")
        seconds, node_metrics = self.phases.read(), self.node_metrics()
        if self.journal is not None:
            share = batches.seconds_waited / max(progress.seconds - self._seconds_before, 1e-9)
            self.journal.metrics(
                progress.step,
                {
                    **{f"train/{name}": value for name, value in values.items()},
                    **{f"gradient_norm/{name}": float(norm) for name, norm in norms.items()},
                    "train/lr": step.lr,
                    "train/weight_decay": step.weight_decay,
                    "train/teacher_momentum": step.momentum,
                    "train/teacher_temperature": step.teacher_temperature,
                    "train/epoch": step.epoch,
                    "perf/samples_seen": float(progress.step * self.schedules.global_batch),
                    "perf/images_per_second": rate,
                    "perf/data_wait_fraction": share,
                    **{f"perf/{name}": value for name, value in seconds.items()},
                    **self._memory(),
                    **{f"system/{name}": value for name, value in node_metrics.items()},
                    "train/skipped_steps": float(progress.skipped),
                    **{f"storage/{name}": value for name, value in batches.usage.items()},
                },
            )
        self.logger.step(progress.step, self.plan.steps, values["loss"], rate, progress.scores, progress.scores_step)
        if self.world.rank == 0:
            for alert in self.alerts.look(step, progress.step, values):
                self.logger.log(f"step {progress.step}: {alert.text}")
                if self.journal is not None:
                    self.journal.metrics(progress.step, {f"alert/{alert.failure_mode}": float(alert.since)})
                    self.journal.tags({f"alert/{alert.failure_mode}": f"step {progress.step}: {alert.text}"})

    def _memory(self) -> dict[str, float]:
        """Memory of this rank in GB by use; activations are what the peak has beyond weights, gradients and optimizer."""
        parts = self.engine.memory()
        now = memory_now(self.world.device)
        if "peak" in now:
            here = sum(size for name, size in parts.items() if name != "host")
            now["activations_peak"] = max(now["peak"] - here, 0.0)
        return {f"memory/{name}_gb": size / 1e9 for name, size in (parts | now).items()}

    def _evaluate(self) -> None:
        """Run the evaluations due at this step and record their scores."""
        if self.evaluate is None:
            return
        with self.phases.phase(EVALUATE):
            scores = self.evaluate(self.progress.step, self.progress.seconds)
        if not scores:
            return
        self.progress.scores.update(scores)
        self.progress.scores_step, self.progress.evaluated_metrics = self.progress.step, tuple(scores)
        if self.journal is not None:
            self.journal.metrics(self.progress.step, scores)

    def _save(self, *, asynchronous: bool = False) -> int:
        """Save a checkpoint, waiting for it unless asynchronous; returns its step."""
        with self.phases.phase(CHECKPOINT):
            return self._write(asynchronous)

    def _write(self, asynchronous: bool) -> int:
        """Save the checkpoint and record what data it has seen."""
        progress = self.progress
        manifest_fields = self._manifest()
        data = manifest_fields["data"]
        self.data_counts = {name: data[name] for name in ("seen", "substituted", "counts", "samples", "fingerprint")}
        if asynchronous:
            self._report_outcome(self.checkpoints.begin(self.engine, self.method, manifest_fields))
        else:
            self._report_outcome(self.checkpoints.finish())
            self._report_outcome(Outcome(progress.step, self.checkpoints.save(self.engine, self.method, manifest_fields)))
        if self.journal is not None:
            substituted = {f"substituted/{reason}": count for reason, count in data["substituted"].items()}
            counts = {"seen": data["seen"], "quarantined": len(data["quarantine"]), **substituted, **data["counts"]}
            self.journal.metrics(progress.step, {f"data/{name}": float(count) for name, count in counts.items()})
        return progress.step

    def _manifest(self) -> dict[str, Any]:
        """What a checkpoint of this moment says of itself; collective."""
        progress = self.progress
        return {
            **self.manifest_fields,
            "step": progress.step,
            "applied": progress.applied,
            "skipped": progress.skipped,
            "samples_seen": progress.step * self.schedules.global_batch,
            "scores": dict(progress.scores),
            "scored": progress.scores_step,
            "judged": list(progress.evaluated_metrics),
            "seconds": progress.seconds,
            "data": self.data_state(),
        }

    def _take_snapshot(self) -> None:
        """Begin a snapshot in host memory."""
        with self.phases.phase(CHECKPOINT):
            self._report_snapshot(self.snapshots.begin(self.engine, self.method, self._manifest()))

    def _report_snapshot(self, outcome: Outcome | None) -> None:
        """Tell of a snapshot that could not be taken."""
        if outcome is not None and outcome.error is not None:
            self.logger.log(f"no snapshot of step {outcome.step} in host memory: {outcome.error.what}; training continues")

    def _report_outcome(self, outcome: Outcome | None) -> None:
        """Print and record the outcome of a save."""
        if outcome is not None and outcome.error is None and self.signatures is not None:
            self.signatures.weights(outcome.step, self.checkpoints.digests)
        if outcome is None or self.journal is None:
            return
        if outcome.error is None:
            samples = outcome.step * self.schedules.global_batch
            self.journal.tags({"fovea.checkpoint": outcome.path, "fovea.samples_seen": samples})
        else:
            self.logger.log(f"no checkpoint of step {outcome.step}: {outcome.error}; training continues")
        self.journal.metrics(outcome.step, {"checkpoint/failures_in_a_row": float(outcome.consecutive_failures)})
        self.journal.sync()


def _due(step: int, every: int, last: int) -> bool:
    """Whether an interval ends at this step; the last step ends all but those of 0, which mean never."""
    return every > 0 and (step % every == 0 or step == last)


def _mean(terms: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each loss term over the micro-batches."""
    return {name: torch.stack([t[name] for t in terms]).mean() for name in terms[0]}
