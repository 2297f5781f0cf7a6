"""Sinkhorn targets: vectors of an independent float64 implementation, and what breaks if a part is left out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.losses import logit_chunks, potential_over_chunks, sinkhorn, sinkhorn_potential

X = torch.tensor([[0.10, -0.05, 0.00], [0.20, 0.10, -0.10], [0.15, 0.05, -0.05], [-0.10, 0.30, 0.10]])
WARM = torch.tensor(
    [
        [0.271862, 0.052136, 0.676001],
        [0.651656, 0.255281, 0.093063],
        [0.503107, 0.197089, 0.299804],
        [0.001477, 0.731761, 0.266763],
    ]
)
COLD = torch.tensor(
    [
        [0.187812, 0.005587, 0.806601],
        [0.882798, 0.091656, 0.025546],
        [0.686645, 0.071290, 0.242064],
        [0.000028, 0.782011, 0.217960],
    ]
)


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, WARM), (0.04, COLD)])
def test_three_iterations_equal_the_reference(temperature: float, expected: torch.Tensor) -> None:
    torch.testing.assert_close(sinkhorn(X, temperature), expected, atol=1e-6, rtol=0)


def test_one_iteration_equals_the_reference() -> None:
    torch.testing.assert_close(sinkhorn(X, 0.07, 1)[0], torch.tensor([0.439144, 0.019702, 0.541154]), atol=1e-6, rtol=0)


def test_potential_holds_the_whole_plan() -> None:
    potential = sinkhorn_potential(X, 0.07)
    expected = torch.tensor([-0.943630, -0.452209, 1.395839])
    torch.testing.assert_close(potential - potential.mean(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.softmax(X / 0.07 + potential, -1), sinkhorn(X, 0.07))


def test_equal_logits_give_uniform_targets() -> None:
    torch.testing.assert_close(sinkhorn(torch.zeros(2, 4), 0.04), torch.full((2, 4), 0.25))


@pytest.mark.parametrize(
    ("logits", "expected"),
    [([[3.6, 0.0], [0.0, 0.0]], [[0.857143, 0.142857], [0.0, 1.0]]), ([[3.0, 3.0], [-3.0, -3.0]], [[0.5, 0.5], [0.5, 0.5]])],
)
def test_logits_that_overflow_a_plain_exponential_are_exact(logits: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(sinkhorn(torch.tensor(logits), 0.04), torch.tensor(expected), atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(2, 9), st.sampled_from([1e-3, 1.0, 300.0]), st.sampled_from([0.02, 0.1]), st.integers(0, 999)
)
def test_targets_are_finite_distributions(n: int, k: int, spread: float, temperature: float, seed: int) -> None:
    logits = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * spread
    targets = sinkhorn(logits, temperature)
    assert torch.isfinite(targets).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(n))


def test_many_iterations_give_every_prototype_equal_mass() -> None:
    logits = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    torch.testing.assert_close(sinkhorn(logits, 0.07, 100).sum(0), torch.full((6,), 4.0), atol=1e-4, rtol=0)


def test_half_precision_logits_are_scaled_in_fp32() -> None:
    assert sinkhorn(X.bfloat16(), 0.04).dtype == torch.float32
    torch.testing.assert_close(sinkhorn(X.bfloat16(), 0.04), sinkhorn(X.bfloat16().float(), 0.04))


def test_no_gradient_flows_into_targets() -> None:
    assert not sinkhorn_potential(X.clone().requires_grad_(), 0.07).requires_grad
    assert not math.isnan(float(sinkhorn(torch.empty(0, 5), 0.07).sum()))


@pytest.mark.parametrize("rows", [None, 3])
def test_autocast_does_not_round_the_plan(rows: int | None) -> None:
    teacher, matrix = (F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)), dim=1) for n in (12, 40))
    expected = potential_over_chunks(logit_chunks([teacher], matrix, 0.05, rows), torch.zeros(40))
    with torch.autocast("cpu", torch.bfloat16):
        found = potential_over_chunks(logit_chunks([teacher], matrix, 0.05, rows), torch.zeros(40))
    assert torch.equal(found, expected)


def test_logits_far_apart_are_scaled_by_their_logarithms_alike() -> None:
    logits = torch.randn(9, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    near = sinkhorn(logits, 0.2).double()  # a range of some 30
    far = potential_over_chunks(lambda: [logits / 0.2, torch.full((0, 30), 0.0, dtype=torch.float64)], torch.zeros(30).double())
    torch.testing.assert_close(torch.softmax(logits / 0.2 + far, -1), near, rtol=1e-5, atol=1e-8)
    spread = torch.cat([logits / 0.2, torch.full((1, 30), -200.0, dtype=torch.float64) + 150 * torch.eye(30)[0]])
    assert potential_over_chunks(lambda: (spread,), torch.zeros(30).double()).isfinite().all()
