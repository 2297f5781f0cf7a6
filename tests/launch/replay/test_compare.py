"""The comparison of signatures: the first stage that differs is named, with the ranks; other ranks are compared within bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from launch.replay.compare import FIRST_BOUND, LATER_BOUND, Result, compare, loss
from launch.replay.plan import ranks_of, rise, spike
from pipeline.errors import ConfigError
from pipeline.training.signature_file import Header, Signature

CPU = Header(attempt=0, rank=0, world=2, device="cpu", micro_batch=2)


def signature(step: int, rank: int, **changes: Any) -> Signature:
    values = {"term/dino": 2.0 + rank, "term/koleo": 0.5} | ({"norm/backbone": 3.0} if rank == 0 else {})
    schedules = (1e-3, 1e-3, 0.04, 0.9, 0.07) if rank == 0 else ()
    one = Signature(step, True, 10 + rank, 20 + rank, bytes([rank, 1, 2, 3]), values, schedules)
    return replace(one, **changes)


def sides(**changes: Any) -> tuple[list[dict[int, Signature]], list[dict[int, Signature]]]:
    """Two ranks of three steps, recorded and replayed; rank 1 of step 1 is replayed with changes."""
    recorded = [{step: signature(step, rank) for step in range(3)} for rank in (0, 1)]
    replayed = [{step: signature(step, rank) for step in range(3)} for rank in (0, 1)]
    replayed[1][1] = replace(replayed[1][1], **changes)
    return recorded, replayed


def result(recorded: list[dict[int, Signature]], replayed: list[dict[int, Signature]], now: Header = CPU) -> Result:
    return compare(
        recorded, replayed, (dict.fromkeys(range(3), CPU), now), range(3), lambda step, rank, at: f"{step}/{rank}/{at}"
    )


def test_equal_steps_are_equal() -> None:
    same = result(*sides())
    assert same.compared == [0, 1, 2] and not same.differences and same.exact and not same.missing


@pytest.mark.parametrize(
    ("changes", "stage", "text"),
    [
        ({"samples": 1, "sketches": bytes([1, 1, 9, 3])}, "samples", "1/1/2"),
        ({"samples": 1}, "samples", "other samples"),
        ({"inputs": 1, "sketches": bytes([0, 1, 2, 3])}, "inputs", "1/1/0"),
        ({"inputs": 1, "sketches": b""}, "inputs", "other views, tokens or masks"),
        ({"values": {"term/dino": 3.5, "term/koleo": 0.5}}, "loss terms", "dino was 3 and is 3.5"),
        ({"values": {"term/dino": 3.0}}, "loss terms", "koleo was 0.5 and is missing"),
        ({"values": {"term/dino": 3.0, "term/koleo": math.nan}}, "loss terms", "koleo was 0.5 and is nan"),
        ({"applied": False}, "applied", "the step was applied, and is not now"),
    ],
)
def test_what_differs_is_named_with_step_and_rank(changes: dict[str, Any], stage: str, text: str) -> None:
    first = result(*sides(**changes)).first
    assert first is not None
    assert (first.step, first.rank, first.stage, first.text) == (1, 1, stage, text)


def test_the_earliest_stage_counts_and_other_ranks_are_listed() -> None:
    recorded, replayed = sides(inputs=5, values={"term/dino": 0.0, "term/koleo": 0.0})
    replayed[0][1] = replace(replayed[0][1], inputs=6)
    first = result(recorded, replayed).first
    assert first is not None and first.stage == "inputs" and first.rank == 0 and first.text.endswith("; also on rank 1")


def test_schedules_and_norms_are_compared_on_the_first_rank() -> None:
    recorded, replayed = sides()
    replayed[0][2] = replace(replayed[0][2], schedules=(2e-3, 1e-3, 0.04, 0.9, 0.07))
    first = result(recorded, replayed).first
    assert first is not None and first.text == "learning rate was 0.001 and is 0.002"
    replayed[0][2] = signature(2, 0, values={"term/dino": 2.0, "term/koleo": 0.5, "norm/backbone": 3.25})
    first = result(recorded, replayed).first
    assert first is not None and (first.stage, first.text) == ("gradient norms", "backbone was 3 and is 3.25")


def test_a_step_of_which_a_rank_is_missing_is_not_compared() -> None:
    recorded, replayed = sides()
    del replayed[1][2]
    del recorded[0][0]
    assert result(recorded, replayed).missing == [0, 2]


def one_rank(step: int, dino: float, **changes: Any) -> Signature:
    """What one rank would have recorded of both."""
    values = {"term/dino": dino, "term/koleo": 0.5, "norm/backbone": 3.0}
    return signature(step, 0, samples=21, inputs=41, values=values, **changes)


@pytest.mark.parametrize(("step", "bound"), [(0, FIRST_BOUND), (1, LATER_BOUND)])
def test_fewer_ranks_are_compared_within_bounds(step: int, bound: float) -> None:
    recorded, _ = sides()
    now = CPU.model_copy(update={"world": 1})
    for factor, equal in ((0.9, True), (1.1, False)):
        replayed = [{number: one_rank(number, 2.5 * (1 + factor * bound * (number == step))) for number in range(3)}]
        same = result(recorded, replayed, now)
        assert not same.exact and bool(same.differences) != equal
        assert same.deviation == pytest.approx(factor * bound)


def test_other_samples_on_fewer_ranks_are_a_difference_and_views_only_on_the_same_device() -> None:
    recorded, _ = sides()
    other = [{step: replace(one_rank(step, 2.5), samples=22) for step in range(3)}]
    first = result(recorded, other, CPU.model_copy(update={"world": 1})).first
    assert first is not None and (first.stage, first.rank) == ("samples", None)
    views = [{step: replace(one_rank(step, 2.5), inputs=0) for step in range(3)}]
    assert result(recorded, views, CPU.model_copy(update={"world": 1})).differences
    elsewhere = result(recorded, views, CPU.model_copy(update={"world": 1, "device": "GPU"}))
    assert not elsewhere.differences and not elsewhere.pixels


@pytest.mark.parametrize("change", [{"world": 1}, {"zero_stage": 2}, {"threads": 7}, {"device": "GPU"}])
def test_a_step_that_may_differ_makes_those_after_it_differ(change: dict[str, Any]) -> None:
    recorded, replayed = sides(values={"term/dino": 3.0 + 1e-6, "term/koleo": 0.5})
    before = CPU.model_copy(update=change)
    if "world" in change:
        recorded[1].pop(0)
    same = compare(recorded, replayed, ({0: before, 1: CPU, 2: CPU}, CPU), range(3), lambda *_: "")
    assert not same.exact and (not same.differences or same.differences[0].step == 0) and same.compared == [0, 1, 2]
    assert compare(recorded, replayed, (dict.fromkeys(range(3), CPU), CPU), range(1, 3), lambda *_: "").differences


def test_terms_of_other_micro_batches_are_not_compared() -> None:
    recorded, replayed = sides(values={"term/dino": 30.0, "term/koleo": 5.0})
    before = CPU.model_copy(update={"micro_batch": 4})
    same = compare(recorded, replayed, ({0: before, 1: CPU, 2: CPU}, CPU), range(3), lambda *_: "")
    assert not same.differences and not same.exact and not same.values
    replayed[1][2] = replace(replayed[1][2], samples=0)
    first = compare(recorded, replayed, ({0: before, 1: CPU, 2: CPU}, CPU), range(3), lambda *_: "").first
    assert first is not None and (first.step, first.stage) == (2, "samples")


def test_a_record_that_claims_many_ranks_starts_none() -> None:
    with pytest.raises(ConfigError, match="the run had 1000000 ranks"):
        ranks_of(CPU.model_copy(update={"world": 1_000_000}), None, None)  # type: ignore[arg-type]


def test_the_loss_is_the_sum_of_the_means_over_ranks() -> None:
    assert loss([signature(0, 0), signature(0, 1)]) == 3.0


def test_a_spike_is_the_largest_rise() -> None:
    assert spike({10: 5.0, 20: 4.0, 30: 6.0, 40: 6.5}) == (20, 30)
    assert spike({10: 5.0, 20: math.nan, 30: 60.0}) == (10, 20)
    assert rise(math.nan, 3.0) == -math.inf and rise(1.0, math.inf) == math.inf
    with pytest.raises(ConfigError, match="fewer than two losses"):
        spike({10: 5.0})
