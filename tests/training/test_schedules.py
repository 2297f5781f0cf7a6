"""Schedules against the per-iteration tables of DINOv2's short method (batch 2048, 125 000 iterations)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import Config
from pipeline.config.types import Length
from pipeline.data.settings import DataSettings
from pipeline.errors import ConfigError
from pipeline.models.settings import ModelSettings
from pipeline.training.schedules import Curve, Schedules, constant
from pipeline.training.settings import CurveSettings, LearningRateCurve, LrScalingSettings, ScheduleSettings, TrainSettings

BATCH, TOTAL = 2048, 125_000
SQRT = LrScalingSettings(rule="sqrt")


def its(n: int) -> int:
    return n * BATCH


SHORT = Schedules(
    global_batch=BATCH,
    epoch_samples=its(1250),
    lr=Curve(0.0, SQRT.scaled(4e-3, BATCH), 1e-6, warmup=its(12_500), length=its(TOTAL)),
    weight_decay=Curve(0.04, 0.04, 0.4, length=its(TOTAL)),
    momentum=Curve(0.992, 0.992, 1.0, length=its(TOTAL)),
    teacher_temperature=Curve(0.04, 0.07, 0.07, warmup=its(37_500), length=its(TOTAL), shape="constant"),
    last_layer_freeze=its(1250),
)


@pytest.mark.parametrize(
    ("iteration", "lr", "weight_decay", "momentum", "temperature"),
    [
        (0, 0.0, 0.04, 0.992, 0.04),
        (1, 4.52584547e-7, 0.0400000001, 0.992, 0.0400008),
        (1249, 5.65278099e-4, 0.0400886771, 0.992001971, 0.0409992266),
        (6250, 0.00282865342, 0.0422160987, 0.992049247, 0.0450001333),
        (12_499, 0.00565685425, 0.0488084292, 0.992195743, 0.0499994667),
        (12_500, 0.00565685425, 0.0488098271, 0.992195774, 0.0500002667),
        (37_499, 0.00499529574, 0.114194995, 0.993648778, 0.07),
        (62_500, 0.00331999152, 0.22, 0.996, 0.07),
        (93_750, 0.00101117061, 0.347279221, 0.998828427, 0.07),
        (124_999, 1.0000011e-6, 0.4, 1.0, 0.07),
        (125_000, 1e-6, 0.4, 1.0, 0.07),
        (200_000, 1e-6, 0.4, 1.0, 0.07),
    ],
)
def test_short_method_equals_the_reference_table(
    iteration: int, lr: float, weight_decay: float, momentum: float, temperature: float
) -> None:
    step = SHORT.at(its(iteration))
    assert step.index == iteration
    assert step.epoch == pytest.approx(iteration / 1250)
    assert step.lr == pytest.approx(lr, rel=2e-8, abs=1e-15)
    assert step.weight_decay == pytest.approx(weight_decay, rel=2e-8)
    assert step.momentum == pytest.approx(momentum, rel=2e-9)
    assert step.teacher_temperature == pytest.approx(temperature, rel=2e-8)


def test_last_layer_stands_still_at_first_then_follows() -> None:
    assert SHORT.at(its(1249)).last_layer_lr == 0.0
    assert SHORT.at(its(1250)).last_layer_lr == SHORT.at(its(1250)).lr == pytest.approx(5.65730683e-4, rel=2e-8)


@pytest.mark.parametrize(("iteration", "lr"), [(50_000, 1.73206813e-4), (362_500, 1.73705081e-4), (624_999, 1.000000003e-6)])
def test_long_method_equals_the_reference_table(iteration: int, lr: float) -> None:
    peak = SQRT.scaled(2e-4, 3072)
    assert peak == pytest.approx(3.46410162e-4, rel=1e-8)
    curve = Curve(0.0, peak, 1e-6, warmup=100_000 * 3072, length=625_000 * 3072)
    assert curve.at(iteration * 3072, 3072) == pytest.approx(lr, rel=2e-8)


@pytest.mark.parametrize(
    ("length", "values"),
    [
        (100, {0: 0.0, 5: 0.5, 9: 0.9, 10: 1.0, 11: 0.999719678, 54: 0.557941816, 98: 0.100280322, 99: 0.1}),
        (30, {9: 0.9, 10: 1.0, 19: 0.587160705, 20: 0.512839295, 29: 0.1, 30: 0.1, 99: 0.1}),
    ],
)
def test_cosine_to_last_equals_dinov3s_table(length: int, values: dict[int, float]) -> None:
    curve = Curve(0.0, 1.0, 0.1, warmup=10 * 64, length=length * 64, shape="cosine_to_last")
    assert {step: curve.at(step * 64, 64) for step in values} == pytest.approx(values, abs=1e-9)


@given(
    st.integers(0, 3_000_000),
    st.sampled_from([1, 7, 512, 4096]),
    st.sampled_from(["cosine", "cosine_to_last", "linear", "constant"]),
)
def test_values_stay_between_the_corners_for_any_batch(samples: int, batch: int, shape: str) -> None:
    curve = Curve(0.5, 2.0, 1.0, warmup=100_000, length=2_000_000, shape=shape)  # type: ignore[arg-type]
    assert 0.5 <= curve.at(samples, batch) <= 2.0
    if samples >= 2_000_000:
        assert curve.at(samples, batch) == (2.0 if shape == "constant" else 1.0)


@given(st.integers(0, 1_000_000))
def test_after_the_warm_up_the_batch_size_changes_nothing(samples: int) -> None:
    curve = Curve(0.0, 1.0, 0.1, warmup=100_000, length=1_000_000)
    if samples >= 100_000:
        assert curve.at(samples, 64) == curve.at(samples, 4096)


def test_a_warm_up_of_one_step_starts_at_start() -> None:
    curve = Curve(0.25, 1.0, 0.1, warmup=64, length=640)
    assert curve.at(0, 64) == 0.25
    assert curve.at(64, 64) == 1.0


@pytest.mark.parametrize(("epochs", "values"), [(1, [0.04, 0.07, 0.07]), (3, [0.04, 0.055, 0.07, 0.07])])
def test_a_curve_per_epoch_is_the_authors_table_of_epochs(epochs: int, values: list[float]) -> None:
    # numpy.linspace(0.04, 0.07, epochs) followed by 0.07, read once an epoch: DINO's and DetailCLIP's code.
    curve = Curve(0.04, 0.07, 0.07, warmup=epochs * 1000, length=10_000, shape="constant", stair=1000)
    for epoch, value in enumerate(values):
        assert [curve.at(epoch * 1000 + seen, 64) for seen in (0, 64, 960)] == pytest.approx([value] * 3)


def test_a_rate_per_epoch_is_moco_v2s() -> None:
    curve = Curve(0.0, 0.03, 0.0, length=200_000, shape="cosine", stair=1000)
    for epoch in (0, 1, 77, 199):
        assert curve.at(epoch * 1000 + 512, 256) == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200)))


def test_constant_never_moves() -> None:
    assert {constant(0.3).at(n, 32) for n in (0, 1, 10**9)} == {0.3}


@pytest.mark.parametrize("shape", ["cosine", "cosine_to_last", "linear"])
def test_a_warm_up_may_fill_the_whole_curve_and_a_run_may_have_one_step(shape: str) -> None:
    filled = Curve(0.0, 1.0, 0.25, warmup=128, length=128, shape=shape)  # type: ignore[arg-type]
    assert [filled.at(seen, 64) for seen in (0, 128, 192)] == [0.0, 0.25, 0.25]
    alone = Curve(0.0, 1.0, 0.25, length=64, shape=shape)  # type: ignore[arg-type]
    assert [alone.at(seen, 64) for seen in (0, 64)] == [1.0, 0.25]


def test_a_warm_up_longer_than_the_curve_is_refused() -> None:
    with pytest.raises(ConfigError, match="warm-up"):
        Curve(0.0, 1.0, 0.0, warmup=11, length=10)


def _config(schedule: ScheduleSettings) -> Config:
    return Config(
        model=ModelSettings(embed_dim=32, depth=1, num_heads=1, patch_size=4),
        data=DataSettings(shards=("a.tar",)),
        train=TrainSettings(global_batch_size=100, duration=Length(10, "epochs")),
        schedule=schedule,
    )


def test_config_lengths_become_samples() -> None:
    schedule = ScheduleSettings(
        lr=LearningRateCurve(warmup=Length(1, "epochs")),
        teacher_momentum=CurveSettings(start=0.9, end=1.0),
        teacher_temperature=CurveSettings(start=0.04, peak=0.07, warmup=Length(30, "steps"), shape="constant"),
    )
    schedules = Schedules.from_config(_config(schedule), epoch_samples=1000)
    assert (schedules.lr.warmup, schedules.lr.length) == (1000, 10_000)
    assert schedules.lr.peak == pytest.approx(2e-4 * (100 / 1024) ** 0.5)
    assert schedules.at(5000).momentum == pytest.approx(0.95)
    assert schedules.at(0).teacher_temperature == 0.04
    assert schedules.at(3000).teacher_temperature == 0.07
    assert schedules.last_layer_freeze == 125_000


def test_a_run_of_epochs_that_fill_no_whole_batches_ends_its_curves_with_its_last_step() -> None:
    """Three epochs of 150 samples in batches of 100 are five steps: the curve is the reference's over five iterations."""
    config = _config(ScheduleSettings()).replace(train=TrainSettings(global_batch_size=100, duration=Length(3, "epochs")))
    schedules = Schedules.from_config(config, epoch_samples=150)
    assert schedules.lr.length == 500
    peak, end = schedules.lr.peak, 1e-6
    expected = [end + 0.5 * (peak - end) * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert [schedules.at(step * 100).lr for step in range(5)] == pytest.approx(expected)


def test_a_short_run_sees_the_beginning_of_a_long_warm_up_that_leads_to_a_constant() -> None:
    schedule = ScheduleSettings(
        teacher_temperature=CurveSettings(start=0.04, peak=0.07, warmup=Length(1000, "steps"), shape="constant")
    )
    short, long = _config(schedule), _config(schedule)
    short = short.replace(train=TrainSettings(global_batch_size=100, duration=Length(20, "steps")))
    long = long.replace(train=TrainSettings(global_batch_size=100, duration=Length(2000, "steps")))
    both = [Schedules.from_config(config, epoch_samples=1000) for config in (short, long)]
    assert [one.at(1500).teacher_temperature for one in both] == [both[1].at(1500).teacher_temperature] * 2
    assert 0.04 < both[0].at(1500).teacher_temperature < 0.041


@pytest.mark.parametrize("name", ["lr", "weight_decay", "teacher_momentum"])
def test_a_warm_up_in_other_units_than_the_run_is_refused_too(name: str) -> None:
    changed = ScheduleSettings().model_dump(mode="json") | {}
    changed[name]["warmup"] = "2 epochs"
    config = _config(ScheduleSettings.model_validate(changed))
    config = config.replace(train=TrainSettings(global_batch_size=100, duration=Length(15, "steps")))
    with pytest.raises(ConfigError, match=rf"schedule\.{name}\.warmup = 2 epochs: a warm-up of 20 steps in a run of 15"):
        Schedules.from_config(config, epoch_samples=1000)


def test_a_config_whose_warm_up_does_not_fit_names_the_key() -> None:
    schedule = ScheduleSettings(lr=LearningRateCurve(warmup=Length(11, "epochs")))
    with pytest.raises(ConfigError, match=r"schedule\.lr\.warmup"):
        Schedules.from_config(_config(schedule), epoch_samples=1000)


def test_a_tower_with_new_heads_stands_still_and_then_follows_within_a_warm_up() -> None:
    schedules = Schedules(
        global_batch=10,
        epoch_samples=100,
        lr=Curve(start=1.0, peak=1.0, end=1.0, warmup=40, length=400),
        weight_decay=constant(0.0),
        backbone_freeze=30,
    )
    shares = [schedules.at(samples).backbone_share for samples in range(0, 100, 10)]
    assert shares == [0.0, 0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]
    assert replace(schedules, backbone_freeze=0).at(0).backbone_share == 1.0
