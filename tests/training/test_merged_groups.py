"""One parameter group instead of one for each pair of multipliers: the same update, bit for bit, in one call and one gather."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch

from pipeline.training.optimizers import Run, Segment, runs_of
from tests.helpers.matrix import fast_only
from tests.helpers.rank_pool import pool
from tests.helpers.tiny_methods import interrupted
from tests.helpers.toy_method import Aligned, advance, assembled, build, snapshot

STEPS = 20
OPTIMIZERS = ("adamw", "sgd", "lars", "lamb")


def _trained(zero: int, merge: bool) -> dict[str, Any]:
    """What there is after twenty steps, by optimizer."""
    found = {}
    for optimizer in OPTIMIZERS:
        method, engine = build(kind=Aligned, zero=zero, optimizer=optimizer, merge=merge, clip=0.5)
        steps = [advance(method, engine, index) for index in range(STEPS)]
        found[optimizer] = {"steps": steps, "groups": len(engine._optimizer.param_groups), **snapshot(method, engine)}
        engine.close()
    return found


def _state(ranks: list[dict[str, Any]], moments: tuple[str, ...]) -> dict[str, torch.Tensor]:
    whole = {f"master {name}": tensor for name, tensor in assembled(ranks).items()}
    for moment in moments:
        whole |= {f"{moment} {name}": tensor for name, tensor in assembled(ranks, moment).items()}
    return whole | {f"teacher {name}": tensor for name, tensor in ranks[0]["teacher"].items()}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero", fast_only([0, 1, 2, 3], [1, 2]))
def test_twenty_steps_in_one_group_are_those_in_four_bit_for_bit(zero: int, ranks: int) -> None:
    apart, merged = (pool(ranks).run(_trained, zero=zero, merge=merge) for merge in (False, True))
    for optimizer in OPTIMIZERS:
        ours, theirs = [rank[optimizer] for rank in merged], [rank[optimizer] for rank in apart]
        assert {rank["groups"] for rank in ours} == {1} and {rank["groups"] for rank in theirs} == {4}
        assert [rank["steps"] for rank in ours] == [rank["steps"] for rank in theirs]
        moments = ("momentum_buffer",) if optimizer in ("sgd", "lars") else ("exp_avg", "exp_avg_sq")
        found, expected = _state(ours, moments), _state(theirs, moments)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], optimizer
        assert not torch.equal(expected["master backbone.0.weight"], Aligned().backbone[0].weight.detach())


@pytest.mark.parametrize(("merge", "zero"), [(True, 1), (False, 2), (True, 3)])
def test_a_checkpoint_of_either_kind_is_read_by_the_other(merge: bool, zero: int, tmp_path: Path) -> None:
    given: dict[str, Any] = {"name": "dinov2", "directory": str(tmp_path), "until": 2}
    saved = pool(2).run(interrupted, **given, zero=1, merge=not merge, load_at=None, save_at=2, seed=0)
    read = pool(2).run(interrupted, **given, zero=zero, merge=merge, load_at=2, save_at=None, seed=1)
    moments = [{key for key in rank if key.startswith("moment")} for rank in read]
    for rank in read:  # moments are held by pieces, which another layout cuts elsewhere
        common = [key for key in rank if not key.startswith("moment")]
        assert common and [key for key in common if not torch.equal(rank[key], saved[0][key])] == []
    assert moments[0] | moments[1] == {key for rank in saved for key in rank if key.startswith("moment")}
    again = pool(2).run(interrupted, **{**given, "until": 4}, zero=zero, merge=merge, load_at=2, save_at=4, seed=1)
    back = pool(2).run(interrupted, **{**given, "until": 4}, zero=1, merge=not merge, load_at=4, save_at=None, seed=2)
    assert [key for key in back[0] if not key.startswith("moment") and not torch.equal(back[0][key], again[0][key])] == []


def _counted(zero: int) -> tuple[int, int]:
    """Calls of the optimizer and gathers of a step."""
    method, engine = build(kind=Aligned, zero=zero, merge=True)
    advance(method, engine, 0)
    optimizer = type(engine._optimizer)
    with (
        mock.patch.object(optimizer, "step", autospec=True, side_effect=optimizer.step) as step,
        mock.patch.object(deepspeed.comm, "all_gather_into_tensor", wraps=deepspeed.comm.all_gather_into_tensor) as gather,
    ):
        advance(method, engine, 1)
    engine.close()
    return step.call_count, gather.call_count


@pytest.mark.parametrize("zero", [1, 2])
def test_a_step_is_one_call_and_one_gather(zero: int) -> None:
    assert pool(2).run(_counted, zero=zero) == [(1, 1), (1, 1)]


def test_neighbours_with_the_same_multipliers_are_one_run() -> None:
    segments = [Segment(2, 7, 3), Segment(0, 0, 4), Segment(1, 4, 3), Segment(3, 11, 2)]
    assert runs_of(segments, [0, 0, 1, 1]) == [Run(0, 0, 7), Run(1, 7, 3), Run(1, 11, 2)]
