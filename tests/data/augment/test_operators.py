"""The table of augmentation operators: rows keep their draws, whatever is added, and every row has its DALI function."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest

from pipeline.data.augment import dali, plan
from pipeline.data.augment.operators import OPERATORS, Augment, Operator
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.views import ViewSpec
from pipeline.methods.shared.crops import global_augments, local_augment

FULL = Augment(
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue_shift=0.1,
    gray_probability=0.2,
    blur_probability=0.5,
    solarize_probability=0.2,
)


def drawn(augment: Augment) -> plan.ViewPlan:
    n = 200
    (one,) = plan.make_plan(
        (ViewSpec("view", 1, 32, (0.3, 1.0), augment=(augment,)),),
        ids=np.arange(n, dtype=np.uint64),
        epochs=np.zeros(n, dtype=np.int64),
        sizes=np.full((n, 2), 64),
        seed=2,
    )
    return one


@pytest.mark.parametrize("position", range(len(OPERATORS) + 1))
def test_a_new_row_leaves_every_existing_draw_as_it_was(monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    before = drawn(FULL).arrays
    row = Operator("new", range(10, 13), lambda draws, a: {"new": draws.sum(0)}, condition="new", used=lambda a: True)
    monkeypatch.setattr(plan, "OPERATORS", (*OPERATORS[:position], row, *OPERATORS[position:]))
    after = drawn(FULL).arrays
    assert after.keys() - before.keys() == {"new"} and np.unique(after["new"]).size == 200
    for name, array in before.items():
        assert array.dtype == after[name].dtype and np.array_equal(array, after[name]), name


def test_no_two_operators_share_a_draw_or_an_array() -> None:
    draws = [0, *itertools.chain.from_iterable(operator.draws for operator in OPERATORS)]
    assert len(set(draws)) == len(draws)
    arrays = [name for operator in OPERATORS for name in operator.plan(np.zeros((len(operator.draws), 1)), FULL)]
    assert len({"start", "end", "flip", *arrays}) == 3 + len(arrays)


def test_every_operator_has_a_function_and_constants_that_are_fields() -> None:
    assert [operator.name for operator in OPERATORS] == list(dali._FUNCTIONS)
    assert {name for operator in OPERATORS for name in operator.constants} <= {field.name for field in fields(Augment)}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_an_operator_that_a_view_does_not_use_is_never_drawn(operator: Operator) -> None:
    unused = replace(FULL, **{f"{operator.name}_probability": 0.0})
    assert operator.used(FULL) and not operator.used(unused)
    assert drawn(FULL).values[operator.condition].any() and not drawn(unused).values[operator.condition].any()


def test_settings_reach_the_views_by_name() -> None:
    settings = AugmentSettings(
        flip_probability=0.1,
        jitter_probability=0.2,
        brightness=0.3,
        contrast=0.35,
        saturation=0.45,
        hue_shift=0.15,
        gray_probability=0.6,
        blur_probability=(0.7,),
        local_blur_probability=0.8,
        solarize_probability=(0.0, 0.9),
    )
    common = Augment(0.1, 0.2, 0.3, 0.35, 0.45, 0.15, 0.6, blur_probability=0.7, blur_kernel=23)
    assert global_augments(settings, blur_kernel=23) == (common, replace(common, solarize_probability=0.9))
    assert local_augment(settings, blur_kernel=23) == replace(common, blur_probability=0.8)
    assert local_augment(settings.model_copy(update={"hue_space": "off"})).hue_shift == 0.0
