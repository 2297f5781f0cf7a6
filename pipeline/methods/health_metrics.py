"""Health metrics: which metrics of a method reveal collapse or divergence, and the usual causes and fixes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.methods.base import Step

UNIFORM_TARGETS = "uniform_targets"  # near-uniform targets
PROTOTYPE_COLLAPSE = "prototype_collapse"  # all samples have the same target
RANK_COLLAPSE = "rank_collapse"  # features span few directions
DIVERGENCE = "divergence"  # learned features are lost
PLATEAU = "plateau"  # metrics do not change

Remedy = Callable[[str, "Step"], str]


@dataclass(frozen=True)
class HealthMetrics:
    """Maps the roles of health metrics to names in ``Method.metrics``; ``None`` where the method lacks the metric.

    Attributes:
        guess: loss of uniform predictions in nats; ln K for K prototypes.
        entropy: mean entropy of a target, as a fraction of the maximum.
        use: entropy of the mean target, as a fraction of the maximum.
        below_guess: difference in nats between the loss of uniform predictions and the loss.
        rank: effective rank of the features.
        agreement: fraction of samples whose top-1 prototype is the same for student and teacher.
        suggest_fix: for a failure mode, a text that follows "likely": the cause and the setting to change.
    """

    guess: float | None = None
    entropy: str | None = None
    use: str | None = None
    below_guess: str | None = None
    rank: str | None = None
    agreement: str | None = None
    suggest_fix: Remedy | None = None


def suggest_fix_of_distillation(student_temperature: float, *, centred: bool, center_momentum: float, koleo: float) -> Remedy:
    """Returns the function that suggests causes and fixes for self-distillation over prototypes (DINO, iBOT, DINOv2).

    Args:
        student_temperature: the student's softmax temperature.
        centred: whether targets are centred; otherwise they come from Sinkhorn-Knopp.
        center_momentum: EMA momentum of the centre.
        koleo: weight of the KoLeo loss.
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
                f"the centre does not move (method.center_momentum is {center_momentum:g}): set it to 0.9, or "
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
            f"the steps are too large (the learning rate is {step.lr:.2g} here) or the teacher follows too fast: lower "
            "schedule.lr.peak, lengthen schedule.lr.warmup and method.freeze_last_layer, or raise schedule.teacher_momentum.start"
        )

    return suggest_fix


def distillation_health(
    prototypes: int, student_temperature: float, *, centred: bool, center_momentum: float, koleo: float
) -> HealthMetrics:
    """Health metrics of self-distillation over prototypes, under the names that DINO and DINOv2 record.

    Args:
        prototypes: number of prototypes K; a uniform guess costs ln K nats.
        student_temperature, centred, center_momentum, koleo: see :func:`suggest_fix_of_distillation`.
    """
    return HealthMetrics(
        guess=math.log(prototypes),
        entropy="target_entropy",
        use="prototype_entropy",
        below_guess="dino_loss_vs_log_k",
        rank="feature_rank",
        agreement="teacher_student_top1_agreement",
        suggest_fix=suggest_fix_of_distillation(
            student_temperature, centred=centred, center_momentum=center_momentum, koleo=koleo
        ),
    )
