"""An optimizer in host memory: the same steps, bit for bit, as with it on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.load import InvalidConfig, load
from tests.checkpoint.test_writer import _train as _saved
from tests.checkpoint.test_writer import assert_same, of
from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import SAMPLES, assembled, batch_at, build, by_torch, step_at
from tests.training.test_engine import STEPS, _train, _with_poison, compare

CASES = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "accumulation"), CASES)
def test_steps_are_those_on_the_device(zero: int, accumulation: int) -> None:
    chosen: dict[str, Any] = {"zero": zero, "accumulation": accumulation, "clip": 0.05, "headless": (3,)}
    here = pool(2).run(_train, offload="cpu", **chosen)
    there = pool(2).run(_train, **chosen)
    for kind in (None, "exp_avg", "exp_avg_sq"):
        first, second = assembled(here, kind), assembled(there, kind)
        for name in second:  # torch's fused AdamW rounds otherwise than the plain one
            torch.testing.assert_close(first[name], second[name], atol=1e-7, rtol=1e-6)
    compare(here, by_torch(STEPS, clip=0.05, scope="network", headless=frozenset({3})))


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "ranks"), [(2, 2), (3, 2), (2, 1)])
def test_steps_computed_in_bf16_are_those_on_the_device(zero: int, ranks: int) -> None:
    here, there = (pool(ranks).run(_train, zero=zero, precision="bf16", clip=3.0, offload=o) for o in ("cpu", "none"))
    for rank in here:
        assert {f.master.dtype for f in rank["fragments"]} == {torch.float32}
    first, second = assembled(here), assembled(there)
    for name in second:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_a_run_goes_on_with_its_optimizer_in_host_memory_and_comes_back(zero: int, tmp_path: Path) -> None:
    folder: dict[str, Any] = {"directory": str(tmp_path), "zero": zero}
    through = pool(2).run(_saved, until=6, save=(2,), **folder)
    away = pool(2).run(_saved, load=2, until=4, save=(4,), offload="cpu", seed=1, **folder)
    before = pool(2).run(_saved, load=2, until=2, seed=2, **folder)
    assert_same(of(away, "loaded"), of(before, "loaded"))
    back = pool(2).run(_saved, load=4, until=6, seed=3, **folder)
    assert_same(of(back, "loaded"), of(away, "end"))
    first, second = assembled(of(back, "end")), assembled(of(through, "end"))
    for name in second:
        torch.testing.assert_close(first[name], second[name], atol=5e-7, rtol=0)


@pytest.mark.parametrize(("kind", "zero"), [("loss", 1), ("gradient", 2), ("loss", 3), ("gradient", 3)])
def test_a_step_that_is_not_finite_leaves_no_trace(kind: str, zero: int) -> None:
    ranks = pool(2).run(_with_poison, kind=kind, zero=zero, clip=0.5, offload="cpu")
    for rank in ranks:
        assert [applied for applied, _ in rank["seen"]] == [True, True, True, False, True, True]
        assert [same for _, same in rank["seen"]] == [False, False, False, True, False, False]
    compare(ranks, by_torch(STEPS, clip=0.5, scope="network", skipped=frozenset({3})))


def _owners(zero: int) -> dict[str, Any]:
    """Whether gradients are read where DeepSpeed's optimizer will read them."""
    _, engine = build(zero=zero, offload="cpu")
    engine.forward_backward(batch_at(0, slice(0, SAMPLES // 2)), step_at(0))
    flats = {id(flat.grad.untyped_storage()): flat for flat in engine.layout.flats()}
    places = {flat.grad.untyped_storage().data_ptr() for flat in flats.values()}
    inside = all(g.untyped_storage().data_ptr() in places for _, g in engine.layout.gradients())
    engine.step(step_at(0), torch.tensor(True))
    emptied = not any(flat.grad.any() for flat in engine.layout.flats())
    engine.close()
    return {"inside": inside, "emptied": emptied}


@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_are_clipped_where_the_optimizer_reads_them_and_emptied_after(zero: int) -> None:
    assert all(rank == {"inside": True, "emptied": True} for rank in pool(2).run(_owners, zero=zero))


@pytest.mark.parametrize("typed", [["train.zero_stage=0"], ["optim.name=lamb"]])
def test_what_cannot_be_offloaded_is_refused(typed: list[str]) -> None:
    words = ["data.shards=/nowhere/x.tar", "train.offload=cpu", *typed]
    with pytest.raises(InvalidConfig, match=r"train\.offload = cpu: needs train\.zero_stage of 1 to 3"):
        load("dinov2/scenes_vit_tiny", words)
