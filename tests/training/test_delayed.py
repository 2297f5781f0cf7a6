"""Whether a step is applied, decided on the device and read later: the same bits as when the host decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.config.schema import METHODS
from pipeline.methods.base import kept
from tests.helpers import tiny_methods as tiny
from tests.helpers.matrix import fast_only
from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import advance, build, snapshot

STEPS, BAD = 6, 3


def _with_poison(kind: str, delay: bool, **chosen: Any) -> list[dict[str, Any]]:
    """State of this rank after each step; one of them is not finite on rank 1."""
    method, engine = build(delay=delay, **chosen)
    states = []
    for index in range(STEPS):
        method.poison = kind if index == BAD and dist.get_rank() == 1 else None
        done = advance(method, engine, index)
        states.append({"applied": done["applied"], "norms": done["norms"], **snapshot(method, engine)})
    engine.close()
    return states


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    named = {f"{kind} {name}": t for kind in ("weights", "teacher", "memory", "buffers") for name, t in state[kind].items()}
    for f in state["fragments"]:
        named |= {f"master {f.name}": f.master, **{f"{moment} {f.name}": m for moment, m in f.moments.items()}}
    return named


@pytest.mark.parametrize("optimizer", fast_only(["adamw", "lars", "lamb"], ["adamw"]))
@pytest.mark.parametrize(
    ("kind", "zero"), [("loss", 0), ("term", 0), ("gradient", 1), ("term", 1), ("loss", 2), ("gradient", 2), ("term", 3)]
)
def test_a_decision_on_the_device_is_the_hosts_bit_for_bit(kind: str, zero: int, optimizer: str) -> None:
    given = {"kind": kind, "zero": zero, "optimizer": optimizer, "clip": 0.5}
    delayed, at_once = (pool(2).run(_with_poison, delay=delay, **given) for delay in (True, False))
    for ours, theirs in zip(delayed, at_once, strict=True):
        assert [state["applied"] for state in ours] == [index != BAD for index in range(STEPS)]
        for index, (now, then) in enumerate(zip(ours, theirs, strict=True)):
            assert now["adam"] == then["adam"]
            found, expected = _tensors(now), _tensors(then)
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], index
        before, after = _tensors(ours[BAD - 1]), _tensors(ours[BAD])
        assert [name for name in before if not torch.equal(before[name], after[name])] == []


def _skipping(name: str, delay: bool, method: dict[str, Any]) -> dict[str, Any]:
    """State of a registered method after the third of five steps of two micro-batches, which is not applied, and at the end."""
    made = tiny.make_method(name, method=method)
    engine = tiny.engine_of(made, 1, 2, delay=delay)
    found = {}
    for index in range(5):
        tiny.advance(made, engine, index, 2, finite=index != 2)
        if index in (2, 4):
            found |= {f"{key} after {index}": value for key, value in tiny.state(made, engine).items()}
    engine.close()
    return found


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_method_is_changed_by_a_step_that_turns_out_to_be_skipped(name: str) -> None:
    # A centre that moves, and a Gram anchor that the skipped step would have refreshed.
    settings = {"centering": "softmax_center", "gram_weight": 1.0, "gram_update_every": 3} if name == "dinov2" else {}
    delayed, at_once = (pool(2).run(_skipping, name=name, delay=delay, method=settings) for delay in (True, False))
    for ours, theirs in zip(delayed, at_once, strict=True):
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_a_skipped_step_keeps_what_was_there_even_if_the_new_value_is_not_finite() -> None:
    new, old = torch.tensor([float("nan"), 1.0]), torch.tensor([2.0, 3.0])
    assert torch.equal(kept(torch.tensor(False), new, old), old)
    assert kept(None, new, old) is new
