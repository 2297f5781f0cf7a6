"""SIGReg against the formula in complex numbers, fp64; over ranks as over all samples at once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.losses import random_directions, sigreg
from tests.helpers.rank_pool import pool

CPU = torch.device("cpu")


def formula(x: Tensor, directions: Tensor, knots: int, limit: float) -> Tensor:
    """The paper's listing of the statistic, one view and one direction at a time."""
    t = torch.linspace(-limit, limit, knots, dtype=torch.float64)
    normal = torch.exp(-t.square() / 2)
    values = []
    for view in x:
        for direction in directions.T:
            characteristic = torch.exp(1j * (view @ direction)[:, None] * t).mean(0)
            values.append(torch.trapezoid((characteristic - normal).abs().square() * normal, t) * len(view))
    return torch.stack(values).mean()


def case(seed: int = 0, views: int = 3, n: int = 12, width: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(views, n, width, generator=draw, dtype=torch.float64) * 1.7 + 0.3
    return x, random_directions(width, 7, seed, CPU).double()


@pytest.mark.parametrize(("knots", "limit"), [(17, 5.0), (3, 1.0), (33, 3.0)])
def test_value_and_gradient_are_the_formulas(knots: int, limit: float) -> None:
    x, directions = case()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    value, expected = sigreg(ours, directions, knots=knots, limit=limit), formula(theirs, directions, knots, limit)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, ours)
    assert torch.allclose(gradient, torch.autograd.grad(expected, theirs)[0], rtol=1e-10, atol=1e-14)


def test_a_number_by_hand() -> None:
    """All samples at 0: the characteristic function is 1 everywhere."""
    value = sigreg(torch.zeros(1, 4, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), knots=4001, limit=12.0)
    integral = math.sqrt(2 * math.pi) * (1 - 2 / math.sqrt(2) + 1 / math.sqrt(3))
    assert value.item() == pytest.approx(4 * integral, rel=1e-9)


def test_a_normal_distribution_costs_little_and_a_collapsed_one_much() -> None:
    draw = torch.Generator().manual_seed(1)
    normal = torch.randn(1, 4096, 16, generator=draw)
    directions = random_directions(16, 64, 0, CPU)
    flat = normal.clone()
    flat[..., 8:] = 0
    costs = [float(sigreg(x, directions)) for x in (normal, 2 * normal, flat, torch.zeros_like(normal))]
    # Under normality the statistic's mean does not grow with the samples: integral of (1 - exp(-t^2)) exp(-t^2/2).
    assert costs[0] == pytest.approx(math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3)), rel=0.25)
    assert all(100 * costs[0] < cost for cost in costs[1:])


def test_half_precision_is_computed_in_fp32() -> None:
    x, directions = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sigreg(x.bfloat16(), directions)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(sigreg(x.bfloat16().double(), directions).item(), rel=1e-5)


def test_directions_are_unit_vectors_of_their_seed() -> None:
    first, again, other = (random_directions(9, 50, seed, CPU) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.allclose(torch.linalg.vector_norm(first, dim=0), torch.ones(50))
    assert float(first.mean(1).abs().max()) < 0.2


def _on_a_rank() -> tuple[float, Tensor]:
    x, directions = case(n=12)
    rank, size = dist.get_rank(), dist.get_world_size()
    own = x.chunk(size, dim=1)[rank].clone().requires_grad_()
    value = sigreg(own, directions)
    return value.item(), torch.autograd.grad(value, own)[0]


def test_over_ranks_it_is_that_of_all_samples() -> None:
    x, directions = case(n=12)
    x.requires_grad_()
    expected = sigreg(x, directions)
    (gradient,) = torch.autograd.grad(expected, x)
    results = pool(2).run(_on_a_rank)
    assert [value for value, _ in results] == pytest.approx([expected.item()] * 2, rel=1e-12)
    parts = torch.cat([slope for _, slope in results], dim=1) / 2  # as an engine that averages over ranks
    assert torch.allclose(parts, gradient, rtol=1e-10, atol=1e-14)
