"""DeepSpeed set up by Accelerate: the same steps, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.errors import TrainingError
from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import advance, assembled, build
from tests.training.test_engine import _train


def _forget() -> None:
    """Accelerate's state lives as long as a process, and a rank of these tests outlives many engines."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def _run(**chosen: Any) -> dict[str, Any]:
    _forget()
    return _train(**chosen)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_six_steps_are_those_of_an_engine_that_we_set_up(zero: int) -> None:
    chosen: dict[str, Any] = {"zero": zero, "accumulation": 2, "clip": 0.05}
    ours, theirs = (pool(2).run(_run, init=init, **chosen) for init in ("deepspeed", "accelerate"))
    for kind in (None, "exp_avg", "exp_avg_sq"):
        first, second = assembled(ours, kind), assembled(theirs, kind)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for a, b in zip(ours, theirs, strict=True):
        assert a["steps"] == b["steps"]
        assert all(torch.equal(a["teacher"][name], b["teacher"][name]) for name in a["teacher"])


def _launched_with_bf16() -> set[torch.dtype]:
    import os

    _forget()
    asked = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "inductor"}
    os.environ.update(asked)
    try:
        method, engine = build(init="accelerate", precision="bf16")
        kinds = {p.dtype for p in method.parameters()} | {f.master.dtype for f in engine.fragments()}
        advance(method, engine, 0)
        engine.close()
    finally:
        for name in asked:
            del os.environ[name]
    return kinds


def test_what_its_launcher_asks_for_does_not_round_the_weights() -> None:
    assert pool(2).run(_launched_with_bf16) == [{torch.float32}] * 2


def _counted_wrong() -> str:
    from accelerate import Accelerator

    _forget()
    found = Accelerator.num_processes
    Accelerator.num_processes = property(lambda self: 1)  # type: ignore[assignment]
    try:
        build(init="accelerate")
    except TrainingError as error:
        return str(error)
    finally:
        Accelerator.num_processes = found  # type: ignore[method-assign]
    return "accepted"


def test_an_accelerate_that_counts_other_ranks_is_refused() -> None:
    for told in pool(2).run(_counted_wrong):
        assert "accelerate reports 1 ranks with DEEPSPEED, but there are 2" in told
