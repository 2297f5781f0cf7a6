"""Dependence of features on a column: against NumPy in fp64, where it is 0, its gradient, and how a batch is divided."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import losses


def drawn(n: int = 60, width: int = 5, values: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of norm 1 in fp64, and numbers of values, some of them missing."""
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(n, width, dtype=torch.float64, generator=generator) + 0.5, dim=1)
    return features, torch.randint(-1, values, (n,), generator=generator)


def reference(features: Tensor, numbers: Tensor) -> float:
    """Variance between the means of the values over the total variance, of the samples that have one."""
    x, y = features.numpy()[numbers.numpy() >= 0], numbers.numpy()[numbers.numpy() >= 0]
    mean = x.mean(0)
    between = sum((y == value).mean() * ((x[y == value].mean(0) - mean) ** 2).sum() for value in np.unique(y))
    return float(between / ((x - mean) ** 2).sum(1).mean())


def test_value_and_gradient_are_those_of_the_ratio_of_variances() -> None:
    features, numbers = drawn()
    inputs = (1.7 * features).requires_grad_()
    unit = F.normalize(inputs, dim=1)
    sums = losses.value_sums(unit, numbers, 3)
    exact = losses.correlation_ratio(sums)
    assert float(exact.detach()) == pytest.approx(reference(features, numbers), rel=1e-12)
    share = (numbers >= 0).double().mean()
    term = losses.dependence(unit, numbers, sums.detach())
    assert float(term.detach()) == pytest.approx(float(share * exact.detach()), rel=1e-12)
    (expected,) = torch.autograd.grad(exact, inputs, retain_graph=True)
    (ours,) = torch.autograd.grad(term, inputs)
    torch.testing.assert_close(ours, share * expected, atol=1e-15, rtol=1e-9)


def test_the_gradient_of_the_ratio_is_that_of_finite_differences() -> None:
    features, numbers = drawn(n=12, width=3)
    inputs = features.clone().requires_grad_()
    sums = losses.value_sums(features, numbers, 3)
    assert torch.autograd.gradcheck(lambda x: losses.dependence(F.normalize(x, dim=1), numbers, sums), (inputs,))
    assert torch.autograd.gradcheck(
        lambda x: losses.correlation_ratio(losses.value_sums(F.normalize(x, dim=1), numbers, 3)), (inputs,)
    )


def test_it_is_zero_for_equal_means_and_one_for_features_that_are_the_value() -> None:
    features, _ = drawn(n=20)
    twice, numbers = torch.cat([features, features]), torch.arange(40) // 20
    sums = losses.value_sums(twice, numbers, 2)
    assert float(losses.correlation_ratio(sums)) == pytest.approx(0, abs=1e-28)
    assert float(losses.dependence(twice, numbers, sums)) == pytest.approx(0, abs=1e-14)
    corners = torch.eye(3, dtype=torch.float64)[torch.arange(30) % 3]
    assert float(losses.correlation_ratio(losses.value_sums(corners, torch.arange(30) % 3, 3))) == pytest.approx(1)


def test_parts_of_a_batch_add_up_to_it() -> None:
    features, numbers = drawn(n=48)
    sums = losses.value_sums(*drawn(n=90, seed=4), 3)
    inputs = features.clone().requires_grad_()
    for term in (
        lambda x, y: losses.dependence(x, y, sums),
        lambda x, y: losses.value_cross_entropy(x[:, :3], y).double(),
    ):
        whole = term(inputs, numbers)
        parts = torch.stack([term(x, y) for x, y in zip(inputs.split(12), numbers.split(12), strict=True)]).mean()
        torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-9)
        pairs = zip(torch.autograd.grad(whole, inputs), torch.autograd.grad(parts, inputs), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
    halves = [losses.value_sums(x, y, 3) for x, y in zip(features.split(24), numbers.split(24), strict=True)]
    torch.testing.assert_close(halves[0] + halves[1], losses.value_sums(features, numbers, 3))


def test_without_a_value_nothing_is_added_and_nothing_is_not_a_number() -> None:
    features, _ = drawn(n=8)
    inputs, none = features.float().requires_grad_(), torch.full((8,), -1)
    empty = torch.zeros(3, 6)
    for term in (
        losses.dependence(inputs, none, losses.value_sums(inputs.detach(), torch.arange(8) % 3, 3)),
        losses.dependence(inputs, torch.arange(8) % 3, empty),  # nothing was summed yet
        losses.value_cross_entropy(inputs[:, :3], none),
    ):
        assert float(term.detach()) == 0
        (gradient,) = torch.autograd.grad(term, inputs)
        assert not gradient.any()
    assert float(losses.correlation_ratio(empty)) == 0
    one_value = losses.value_sums(inputs.detach(), torch.zeros(8, dtype=torch.int64), 3)
    assert float(losses.correlation_ratio(one_value)) == pytest.approx(0, abs=1e-6)
    equal = torch.ones(6, 5) / math.sqrt(5)
    collapsed = losses.dependence(equal, torch.arange(6) % 3, losses.value_sums(equal, torch.arange(6) % 3, 3))
    assert bool(collapsed.isfinite())


def test_a_guess_costs_one_and_certainty_nothing() -> None:
    numbers = torch.arange(12) % 4
    assert float(losses.value_cross_entropy(torch.zeros(12, 4), numbers)) == pytest.approx(1)
    assert float(losses.value_cross_entropy(100 * F.one_hot(numbers, 4).float(), numbers)) == pytest.approx(0, abs=1e-6)
