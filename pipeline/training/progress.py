"""Plan and progress of a run, and how progress is displayed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipeline.data.order.random import mix

_DEVICE_SEED = 0x57E9  # stream constant of the seeds for a method's random draws on the device


@dataclass(frozen=True)
class Plan:
    """Length and intervals of a run, in optimizer steps.

    Attributes:
        steps: the step at which the run is finished.
        pause_at: step at which it evaluates, saves and stops, ``None`` for none.
        log_every, evaluate_every, checkpoint_every: intervals, 0 for never.
        max_nonfinite: consecutive non-finite steps that stop the run.
        seed: the run's seed.
        record: file for each step's keys and loss terms of this rank, or ``None``.
        rollback_after: consecutive non-finite steps that trigger a rollback to the last checkpoint, ``None`` for never.
        rollback_margin: steps before them that are skipped as well.
        max_rollbacks: maximum number of rollbacks.
        asynchronous: whether checkpoints are written while training continues.
        save_evaluated: metric after whose measurement a checkpoint is saved, so that the best one can be kept.
        accumulation: micro-batches per rank of a run that is replayed on fewer ranks, ``None`` for as many as there are.
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
    pause_at: int | None = None
    accumulation: int | None = None

    def device_seeds(self, step: int, rank: int, count: int) -> list[int]:
        """Seeds of the method's random draws on the device, one for each of a rank's ``count`` micro-batches."""
        places = (divmod(rank * count + index, self.accumulation or count) for index in range(count))
        return [mix(self.seed, _DEVICE_SEED, step, *where)[0] for where in places]


@dataclass
class Progress:
    """Progress of a run, saved in checkpoints beside the tensors.

    Attributes:
        step: steps done, which is also the number of the next one.
        applied: steps whose gradients were applied.
        skipped: steps skipped because of a non-finite loss or gradient.
        scores: the latest evaluation, by metric.
        scores_step: step of that evaluation, -1 for none.
        evaluated_metrics: metrics measured at that step; others in ``scores`` are older.
        seconds: wall time that advanced training, over all attempts.
    """

    step: int = 0
    applied: int = 0
    skipped: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    scores_step: int = -1
    evaluated_metrics: tuple[str, ...] = ()
    seconds: float = 0.0


class ProgressLogger(Protocol):
    """Displays progress; a no-op except on rank 0."""

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scores_step: int) -> None:
        """Called after a logged step: steps done and in total, loss, images per second, latest scores and their step."""
        ...

    def log(self, text: str) -> None:
        """Print one line."""
        ...
