"""Guards of what is not the model: loop and resume. Bounds are generous: a busy machine must not turn them red."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline import losses
from pipeline.bench import pairs, resume, trainer_overhead
from pipeline.bench.plain import Size
from tests.helpers.rank_pool import pool


def test_the_loop_adds_little_to_a_step() -> None:
    options = trainer_overhead.Options(steps=20, size=Size(width=16, depth=2))
    (result,) = pool(1).run(trainer_overhead.measure, options=options)
    assert len(result.trainer) == len(result.engine) == len(result.bare) == 20
    assert min(result.bare) > 0
    assert result.loop < 20 * trainer_overhead.AIM
    page = trainer_overhead.markdown(result, options, {"cores": "2"}, "fovea bench trainer-overhead")
    assert "| trainer |" in page and "The loop adds" in page


def test_resuming_reads_what_the_formula_says_and_takes_about_a_fresh_start() -> None:
    options = resume.Options(Size(width=256, depth=8), rounds=2)
    (result,) = pool(1).run(resume.measure, options=options)
    assert result.stored == pytest.approx(resume.BYTES * result.parameters, rel=0.02)
    assert 0.3 < result.ratio < 5
    assert "by formula" in resume.markdown(result, options, {"cores": "2"}, "fovea bench resume")


def test_sinkhorn_costs_less_than_scaling_the_whole_matrix_again_and_again() -> None:
    logits = torch.randn(256, 16384, generator=torch.Generator().manual_seed(0)) / 5

    def matrix() -> Tensor:
        plan = torch.exp(logits / 0.07).T
        plan = plan / plan.sum()
        for _ in range(3):
            plan = plan / plan.sum(1, keepdim=True) / len(plan)
            plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
        return (plan * plan.shape[1]).T

    torch.testing.assert_close(losses.sinkhorn(logits, 0.07), matrix(), rtol=1e-4, atol=1e-9)
    rivals = {"ours": lambda: losses.sinkhorn_potential(logits, 0.07), "matrix": matrix}
    cases = pairs.measure(rivals, rounds=3, device=torch.device("cpu"))
    assert cases["ours"].best < 0.8 * cases["matrix"].best, "0.3 on a quiet machine"
    assert cases["ours"].peak < cases["matrix"].peak
