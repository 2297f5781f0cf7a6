"""CLIP through the real engine: ranks and micro-batches change nothing but rounding."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from pipeline.methods.base import Step
from tests.helpers.matrix import fast_only
from tests.helpers.method_pairs import SAMPLES, clip, engine_of, pairs_at, trained
from tests.helpers.rank_pool import pool


@cache
def reference(loss: str, patch_dropout: float) -> dict[str, Any]:
    """One rank, the whole batch at once."""
    result: dict[str, Any] = pool(1).run(trained, zero=0, accumulation=1, loss=loss, patch_dropout=patch_dropout)[0]
    return result


def compare(ranks: list[dict[str, Any]], other: dict[str, Any], weights: float) -> None:
    for index, term in enumerate(other["terms"]):
        assert sum(rank["terms"][index] for rank in ranks) / len(ranks) == pytest.approx(term, abs=2e-5)
        for rank in ranks:
            assert rank["norms"][index] == pytest.approx(other["norms"][index], rel=2e-4)
    for rank in ranks:
        for name, weight in other["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, atol=weights, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("ranks", "zero", "accumulation"), fast_only([(1, 0, 4), (2, 1, 1), (2, 2, 2), (2, 3, 2)], [(1, 0, 4), (2, 1, 1), (2, 2, 2)])
)
def test_ranks_and_micro_batches_train_like_one_large_batch(loss: str, ranks: int, zero: int, accumulation: int) -> None:
    for patch_dropout in (0.0, 0.5) if (ranks, accumulation) == (2, 2) else (0.0,):
        found = pool(ranks).run(trained, zero=zero, accumulation=accumulation, loss=loss, patch_dropout=patch_dropout)
        compare(found, reference(loss, patch_dropout), 1e-5)


def test_plain_accumulation_is_another_training() -> None:
    found = pool(1).run(trained, zero=0, accumulation=4, grad_cache=False)
    assert abs(found[0]["terms"][0] - reference("softmax", 0.0)["terms"][0]) > 0.1


def _scales(zero: Literal[0, 1, 2, 3]) -> list[float]:
    """The scale in use before and after steps that push it far beyond its bound."""
    method = clip(init_logit_scale=99.0)
    engine = engine_of(method, zero, SAMPLES // dist.get_world_size(), 1)
    begin = dist.get_rank() * engine.options.micro_batch
    seen = []
    for index in range(4):
        step = Step(index=index, lr=3.0, last_layer_lr=3.0)
        same = pairs_at(index, slice(begin, begin + engine.options.micro_batch))
        terms = engine.forward_backward(same, step)
        seen.append(float(method.metrics["logit_scale"]))
        engine.step(step, terms["contrastive"].isfinite())
        method.after_step(step)
    engine.close()
    return seen


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_scale_in_use_never_leaves_its_bounds_whatever_the_masters_say(zero: int) -> None:
    for seen in pool(2).run(_scales, zero=zero):
        assert seen[0] == pytest.approx(99.0)
        assert all(1.0 <= value <= 100.0 + 1e-3 for value in seen)
        assert len(set(seen)) > 1, "the step did not reach the scale"
