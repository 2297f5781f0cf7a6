"""Which of a method's metrics tell whether it is well, and what is usually wrong when they say it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.methods.base import Step

UNIFORM_TARGETS = "uniform_targets"  # all undecided
PROTOTYPE_COLLAPSE = "prototype_collapse"  # all targets the same
RANK_COLLAPSE = "rank_collapse"  # features in few directions
DIVERGENCE = "divergence"  # what was learnt is lost
PLATEAU = "plateau"  # nothing moves

Remedy = Callable[[str, "Step"], str]


@dataclass(frozen=True)
class HealthMetrics:
    """What a method's metrics mean; names are those in ``Method.metrics``, and ``None`` is a sign that it does not have.

    Attributes:
        guess: loss of a mere guess, nats; ln K for K prototypes.
        entropy: mean entropy of a target, as a share of the most possible.
        use: entropy of the mean target, as a share of the most possible.
        below_guess: nats by which the loss lies below that of a guess.
        rank: effective number of directions in which features differ.
        agreement: share of samples for which student and teacher prefer the same.
        remedy: for an illness, in the words that follow "likely": its cause and the setting to change.
    """

    guess: float | None = None
    entropy: str | None = None
    use: str | None = None
    below_guess: str | None = None
    rank: str | None = None
    agreement: str | None = None
    suggest_fix: Remedy | None = None


def suggest_fix_of_distillation(student_temperature: float, *, centred: bool, center_momentum: float, koleo: float) -> Remedy:
    """What usually ails self-distillation over prototypes (DINO, iBOT, DINOv2).

    Args:
        student_temperature: the student's.
        centred: whether targets are centred; otherwise they are balanced.
        center_momentum: share of the old centre that is kept.
        koleo: weight of the term that spreads features.
    """

    def suggest_fix(failure_mode: str, step: Step) -> str:
        warm = step.teacher_temperature
        if failure_mode == UNIFORM_TARGETS and warm >= 0.75 * student_temperature:
            return (
                f"the teacher's temperature ({warm:g}) is not well below the student's ({student_temperature:g}), which is what "
                "keeps targets decided: lower schedule.teacher_temperature to 0.04-0.07"
            )
        if failure_mode == PROTOTYPE_COLLAPSE and centred and center_momentum > 0.99:
            return (
                f"the centre stands still (method.center_momentum is {center_momentum:g}): set it to 0.9, or "
                "method.centering=sinkhorn_knopp"
            )
        if failure_mode == PROTOTYPE_COLLAPSE:
            return (
                "nothing keeps one prototype from taking all samples: set method.centering=sinkhorn_knopp, or raise "
                "schedule.teacher_temperature"
            )
        if failure_mode == RANK_COLLAPSE and koleo <= 0:
            return "nothing spreads the features: set method.koleo_weight=0.1"
        if failure_mode == RANK_COLLAPSE:
            return (
                "the spreading term is too weak or the steps are too large: raise method.koleo_weight, or lower schedule.lr.peak"
            )
        return (
            f"the steps are too large (schedule.lr.peak is {step.lr:.2g} here) or the teacher follows too fast: lower "
            "schedule.lr.peak, lengthen schedule.lr.warmup and method.freeze_last_layer, or raise schedule.teacher_momentum.start"
        )

    return suggest_fix
