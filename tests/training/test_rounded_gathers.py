"""ZeRO 3 gathers in bf16 what autocast rounds to bf16: half of the bytes, and not one other bit."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from pipeline.bench.collectives import Collectives
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.models.fp8 import use_fp8
from pipeline.training import engine as engine_module
from pipeline.training.rounded_gathers import _MARK, drop_rounded, mark_rounded
from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import Aligned, advance, build, snapshot

STEPS = 4


class WithJudge(Aligned):
    """With a frozen layer that each forward pass uses."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.judge = nn.Linear(12, 64).requires_grad_(False)

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        goal = self.judge(batch.views["view"][0]).detach()
        return super().forward(batch, step) | {"judged": (self.backbone(batch.views["view"][0]) - goal).square().mean()}


def _train(rounded: bool, accumulation: int = 1, precision: str = "bf16") -> dict[str, Any]:
    marks = mark_rounded if rounded else lambda *_: 0
    counted: list[Counter[str]] = []
    with mock.patch.object(engine_module, "mark_rounded", marks):
        method, engine = build(kind=WithJudge, zero=3, precision=precision, accumulation=accumulation)
    with engine.gathered():
        judge = method.judge.weight.detach().clone()
    done, kept = [], []
    for index in range(STEPS):
        with Collectives() as collectives:
            done.append(advance(method, engine, index))
        counted.append(collectives.payload)
        with engine.gathered():  # as for a checkpoint
            kept.append(torch.equal(method.judge.weight, judge))
    end = snapshot(method, engine)
    engine.close()
    return {"steps": done, "kept": kept, "judge": judge, "bytes": dict(counted[-1]), **end}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gathers_take_half_of_the_bytes_and_change_no_bit(accumulation: int) -> None:
    exact, rounded = (pool(2).run(_train, rounded=rounded, accumulation=accumulation) for rounded in (False, True))
    for one, other in zip(exact, rounded, strict=True):
        for index in range(STEPS):
            assert one["steps"][index]["terms"] == other["steps"][index]["terms"]
        for kind in ("weights", "teacher", "memory"):
            assert all(torch.equal(tensor, other[kind][name]) for name, tensor in one[kind].items())
        assert other["bytes"]["reduce-scatter"] == one["bytes"]["reduce-scatter"]
        gathered = [rank["bytes"]["all-gather"] + rank["bytes"]["small"] for rank in (one, other)]  # biases are small
        assert 0.5 <= gathered[1] / gathered[0] < 0.55


def test_outside_of_a_training_pass_weights_are_gathered_exactly() -> None:
    (rank, _) = pool(2).run(_train, rounded=True)
    assert all(rank["kept"]) and not torch.equal(rank["judge"], rank["judge"].bfloat16().float())


def test_in_fp32_nothing_is_rounded() -> None:
    exact, marked = (pool(2).run(_train, rounded=rounded, precision="fp32") for rounded in (False, True))
    assert exact[0]["bytes"] == marked[0]["bytes"]
    assert all(torch.equal(tensor, marked[0]["weights"][name]) for name, tensor in exact[0]["weights"].items())


def test_only_weights_that_autocast_rounds_are_marked() -> None:
    network = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Embedding(3, 16), nn.Conv2d(3, 4, 1), nn.Linear(16, 32))
    use_fp8(network[4:])
    module = SimpleNamespace(get_allgather_dtype=lambda *_: torch.float32)
    assert mark_rounded([network], module) == 4
    marked = [hasattr(parameter, _MARK) for parameter in network.parameters()]
    assert marked == [True, True, False, False, False, True, True, False, False]
    assert mark_rounded([nn.Linear(2, 2)], SimpleNamespace()) == 0, "an older DeepSpeed cannot gather in another dtype"


def test_what_a_pass_has_left_gathered_is_released() -> None:
    released: list[str] = []

    def parameter(name: str, status: str = "AVAILABLE", active: bool = False, **more: bool) -> Any:
        state = SimpleNamespace(name=status)
        return SimpleNamespace(ds_status=state, ds_active_sub_modules=active, partition=lambda: released.append(name), **more)

    mark = {_MARK: True}
    drop_rounded([parameter("exact"), parameter("rounded", **mark), parameter("away", "NOT_AVAILABLE", **mark)])
    drop_rounded([parameter("in use", active=True, **mark)])
    assert released == ["rounded"]
