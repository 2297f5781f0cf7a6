"""The formula of memory against the bytes of a real engine."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from pipeline.estimate.activations import Alive, alive, counted
from pipeline.estimate.memory import held
from tests.helpers.matrix import fast_only
from tests.helpers.rank_pool import pool
from tests.helpers.tiny_methods import STEP, batch_at, config, make_method

HIDDEN = 20_000


def live(zero: int) -> dict[str, Any]:
    """On a rank: bytes by part after a backward pass, and of every tensor that Python can reach."""
    import torch
    import torch.distributed as dist

    from pipeline.training.engine import Engine, _configuration
    from tests.helpers import toy_method as toy

    def reachable() -> dict[int, int]:
        found = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None and tensor.device.type == "cpu":
                        storage = tensor.untyped_storage()
                        found[storage.data_ptr()] = storage.nbytes()
        return found

    gc.collect()
    before = reachable()
    method = toy.Toy(0, HIDDEN)
    engine = Engine(method, toy.options(zero=zero), torch.device("cpu"))  # type: ignore[arg-type]
    groups = [[engine.shapes[name] for name in group.names] for group in method.parameter_groups()]
    share = toy.SAMPLES // dist.get_world_size()
    for index in range(2):
        rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
        engine.forward_backward(toy.batch_at(index, rows), toy.step_at(index))
        if index == 1:
            break
        engine.step(toy.step_at(index), torch.tensor(True))
        method.after_step(toy.step_at(index))
    gc.collect()
    parts = engine.memory()
    everything = sum(size for place, size in reachable().items() if place not in before)
    sizes = [torch.Size(shape).numel() for shape in engine.shapes.values()]
    bucket = _configuration(engine.options, dist.get_world_size(), torch.device("cpu"), sizes)["zero_optimization"][
        "reduce_bucket_size"
    ]
    engine.step(toy.step_at(1), torch.tensor(True))
    engine.close()
    return {
        "parts": parts,
        "everything": everything,
        "groups": [[int(torch.Size(shape).numel()) for shape in group] for group in groups],
        "bucket": bucket,
    }


@pytest.mark.parametrize(
    ("zero", "count"),
    fast_only([(0, 2), (1, 2), (2, 2), (3, 2), (1, 4), (2, 4), (3, 4)], [(3, 2)]),
)
def test_the_formula_is_within_three_percent_of_what_an_engine_holds(zero: int, count: int) -> None:
    ranks = pool(count).run(live, zero=zero)
    groups = ranks[0]["groups"]
    teacher = [size for group in groups for size in group if size != 1]  # the toy's scale has no teacher
    formula = held(groups, frozen=[3], teacher=teacher, stage=zero, ranks=count, bf16=False, overlap=False)
    if zero:
        assert formula.buckets == 4 * ranks[0]["bucket"]
    for name in ("parameters", "gradients", "masters", "moments", "teacher"):
        most = max(rank["parts"][name] for rank in ranks)
        assert most == pytest.approx(getattr(formula, name), rel=0.03), name
    lasting = formula.total - formula.buckets - formula.gathered
    # Stage 3's bucket lasts; below it, and in stage 0, buckets live only while gradients are reduced.
    most = max(rank["everything"] for rank in ranks) - (formula.buckets if zero == 3 else 0)
    assert most == pytest.approx(lasting, rel=0.03)


def test_shares_shrink_with_the_ranks_and_the_stage() -> None:
    groups = [[1_000_000] * 100, [1_000] * 200]
    teacher = [size for group in groups for size in group]
    totals = {
        (stage, ranks): held(groups, teacher=teacher, stage=stage, ranks=ranks, bf16=False, overlap=False)
        for stage in range(4)
        for ranks in (1, 8, 64)
    }
    n = sum(teacher)
    assert totals[0, 8].total - totals[0, 8].buckets == 20 * n
    two = totals[2, 8]
    assert two.parameters + two.gradients + two.masters + two.moments + two.teacher == pytest.approx((8 + 16 / 8) * n, rel=0.03)
    three = totals[3, 8]
    assert three.parameters + three.gradients + three.masters + three.moments + three.teacher == pytest.approx(
        24 / 8 * n, rel=0.01
    )
    assert (
        held(groups, stage=1, ranks=8, accumulation=2).gradients
        > held(groups, stage=2, ranks=8, accumulation=2).gradients + 3.9 * n
    )


@pytest.mark.parametrize("name", fast_only(["dinov2", "clip", "detailclip", "mocov2", "coca"], ["clip", "detailclip"]))
def test_what_a_forward_pass_keeps_is_counted_without_memory_within_five_percent(name: str) -> None:
    settings = config(name, train={"global_batch_size": 8, "precision": "fp32"})
    kept = []
    for samples in (8, 16):
        made = make_method(name, train={"global_batch_size": 8, "precision": "fp32"}).train()
        batch = batch_at(made, 0, samples=samples)
        with Alive() as found:
            made.before_accumulation([batch], STEP)
            terms = made(batch, STEP)
            kept.append(found.now)
        del terms
    told = [alive(settings, samples)[0] for samples in (8, 16)]
    assert told[1] - told[0] == pytest.approx(kept[1] - kept[0], rel=0.05)
    assert told[1] == pytest.approx(kept[1], rel=0.05)


@pytest.mark.slow
def test_recomputation_keeps_less_and_bf16_half_of_most() -> None:
    each = {}
    for name, train in {"fp32": {}, "bf16": {"precision": "bf16"}, "again": {"activation_checkpointing": True}}.items():
        each[name] = counted(config("dinov2", train={"global_batch_size": 8, "precision": "fp32", **train})).each
    assert each["again"] < 0.7 * each["fp32"] and 0.5 * each["fp32"] < each["bf16"] < 0.85 * each["fp32"]
