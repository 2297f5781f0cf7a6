"""Collapse, divergence and standing still are noticed within 200 steps, once, with their cause; healthy runs are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from pipeline.methods.base import Step
from pipeline.methods.health_metrics import HealthMetrics, suggest_fix_of_distillation
from pipeline.training.alerts import Alert, Alerts
from tests.helpers.ailing import train

GUESS = math.log(65536)
VITALS = HealthMetrics(
    guess=GUESS,
    entropy="entropy",
    use="use",
    below_guess="below",
    rank="rank",
    agreement="teacher_student_top1_agreement",
    suggest_fix=suggest_fix_of_distillation(0.1, centred=True, center_momentum=0.9, koleo=0.1),
)
ONSET = 600


def healthy(step: int) -> dict[str, float]:
    """A run that warms up, then learns; every logged mean a little off."""
    progress, noise = 1 - math.exp(-step / 1500), 0.02 * math.sin(7.0 * step)
    return {
        "loss": 12.8 - 3 * progress + noise,
        "entropy": 0.9 - 0.3 * progress + noise / 10,
        "use": 0.95 + noise / 10,
        "below": -0.2 + 2 * progress + noise,
        "rank": 3 + 20 * progress + noise,
        "teacher_student_top1_agreement": 0.4 * progress,
    }


def watch(
    numbers: Callable[[int], Mapping[str, float]],
    *,
    steps: int = 1500,
    every: int = 10,
    health_metrics: HealthMetrics | None = VITALS,
    lr: Callable[[int], float] = lambda step: min(step / 300, 1.0),
) -> list[tuple[int, Alert]]:
    alarms, raised = Alerts(health_metrics), []
    for done in range(every, steps + 1, every):
        step = Step(index=done - 1, lr=lr(done), teacher_temperature=0.05)
        raised += [(done, alarm) for alarm in alarms.look(step, done, numbers(done))]
    return raised


def ill(onset: int = ONSET, **changes: Any) -> Callable[[int], dict[str, float]]:
    """Healthy until the onset; then numbers, or functions of the steps since, take their places."""

    def numbers(step: int) -> dict[str, float]:
        now = healthy(step)
        if step > onset:
            now |= {name: value(step - onset) if callable(value) else value for name, value in changes.items()}
        return now

    return numbers


CASES = {
    "uniform_targets": ill(entropy=1.0, below=0.0),
    "prototype_collapse": ill(use=0.01, entropy=0.01),
    "rank_collapse": ill(rank=1.1),
    "divergence": ill(loss=lambda since: 12.0 + 0.1 * since),
}


@pytest.mark.parametrize("every", [1, 10, 40])
@pytest.mark.parametrize("failure_mode", CASES)
def test_each_illness_is_told_once_and_within_200_steps(failure_mode: str, every: int) -> None:
    raised = [(done, alarm) for done, alarm in watch(CASES[failure_mode], every=every) if alarm.failure_mode == failure_mode]
    assert len(raised) == 1
    done, alarm = raised[0]
    assert ONSET < done <= ONSET + 200
    assert ONSET < alarm.since < done
    assert "; likely " in alarm.text and "\n" not in alarm.text


@pytest.mark.parametrize("every", [1, 10, 100])
def test_a_healthy_run_raises_no_alarm(every: int) -> None:
    assert watch(healthy, steps=6000, every=every) == []


def test_what_was_learnt_and_is_lost_again_is_told() -> None:
    raised = watch(ill(onset=1500, below=lambda since: 0.2 + math.exp(-since / 20)), steps=2000)
    assert [alarm.failure_mode for _, alarm in raised] == ["divergence"]
    assert raised[0][0] <= 1700


def test_a_plateau_at_ln_k_is_told_where_the_targets_stay_decided() -> None:
    raised = watch(ill(below=0.05, teacher_student_top1_agreement=0.01), steps=900)
    assert {alarm.failure_mode for _, alarm in raised} == {"plateau"}
    assert all(done <= ONSET + 200 for done, _ in raised)


def test_a_loss_that_never_moves_is_told_of_any_method() -> None:
    raised = watch(lambda step: {"loss": 2.5}, health_metrics=None, lr=lambda step: 1e-3)
    assert [(alarm.failure_mode, done <= 200) for done, alarm in raised] == [("plateau", True)]
    assert "gradient_norm and schedule.lr" in raised[0][1].text


def test_a_rising_loss_is_told_of_any_method() -> None:
    raised = watch(lambda step: {"loss": 2.0 * 1.01 ** max(step - ONSET, 0) + 0.01 * math.sin(step)}, health_metrics=None)
    assert [alarm.failure_mode for _, alarm in raised] == ["divergence"]
    assert ONSET < raised[0][0] <= ONSET + 200


def test_one_bad_batch_is_no_illness() -> None:
    bad = {"loss": 90.0, "entropy": 1.0, "below": 0.0, "use": 0.0, "rank": 1.0}
    assert watch(lambda step: healthy(step) | (bad if step == ONSET + 50 else {})) == []


def test_fresh_networks_may_be_undecided_while_the_rate_warms_up_but_not_for_ever() -> None:
    def undecided(step: int) -> dict[str, float]:
        return healthy(step) | {"entropy": 0.999, "below": -0.01, "rank": 1.05}

    raised = watch(undecided, steps=1500, lr=lambda step: min(step / 1000, 1.0))
    assert {alarm.failure_mode for _, alarm in raised} >= {"uniform_targets", "rank_collapse"}
    assert all(1000 < done <= 1250 for done, _ in raised)


def test_a_second_onset_is_not_told_again_and_a_rewind_starts_anew() -> None:
    alarms = Alerts(VITALS)
    for done in range(10, 2000, 10):
        sick = 600 < done < 900 or done > 1200
        found = alarms.look(Step(lr=1.0), done, healthy(done) | ({"use": 0.0} if sick else {}))
        assert [alarm.failure_mode for alarm in found] == (["prototype_collapse"] if 700 <= done <= 760 and found else [])
    assert alarms.look(Step(lr=1.0), 500, healthy(500)) == []
    assert len(alarms._seen) == 1


def test_numbers_that_are_not_finite_are_left_to_the_trainer() -> None:
    assert watch(lambda step: {"loss": math.nan}) == []


def test_causes_follow_the_settings() -> None:
    step = Step(teacher_temperature=0.09, lr=1e-3)
    suggest_fix = suggest_fix_of_distillation(0.1, centred=True, center_momentum=1.0, koleo=0.0)
    assert "schedule.teacher_temperature" in suggest_fix("uniform_targets", step)
    assert "method.center_momentum is 1" in suggest_fix("prototype_collapse", step)
    assert "method.koleo_weight=0.1" in suggest_fix("rank_collapse", step)
    assert "schedule.lr.peak" in suggest_fix(
        "uniform_targets", Step(teacher_temperature=0.05)
    ) and "schedule.lr.peak" in suggest_fix("divergence", step)
    balanced = suggest_fix_of_distillation(0.1, centred=False, center_momentum=0.9, koleo=0.1)
    assert "method.centering=sinkhorn_knopp" in balanced("prototype_collapse", step) and "raise method.koleo_weight" in balanced(
        "rank_collapse", step
    )


ILL = {
    "no_centre": (
        {"centering": "softmax_center", "center_momentum": 1.0, "temperature": 0.04, "koleo_weight": 0.0},
        "prototype_collapse",
        "centre",
    ),
    "no_sharpening": ({"temperature": 0.5, "koleo_weight": 0.0}, "uniform_targets", "teacher's temperature (0.5)"),
    "absurd_rate": ({"lr": 1.0}, "uniform_targets", "lower schedule.lr.peak"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ILL)
def test_dinov2_made_to_collapse_is_told_within_200_steps_and_why(case: str) -> None:
    changes, failure_mode, cause = ILL[case]
    raised, _ = train(200, **changes)
    assert raised and raised[0][1].failure_mode == failure_mode
    assert cause in raised[0][1].text


@pytest.mark.slow
@pytest.mark.parametrize("targets", [{}, {"centering": "softmax_center", "temperature": 0.04, "momentum": 0.98, "lr": 1e-3}])
def test_dinov2_that_learns_raises_no_alarm(targets: dict[str, Any]) -> None:
    raised, logged = train(200, **targets)
    assert raised == []
    early, late = logged[0], logged[-1]
    assert late["loss"] < early["loss"] and late["feature_rank"] > early["feature_rank"]
