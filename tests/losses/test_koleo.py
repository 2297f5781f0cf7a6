"""KoLeo: reference vectors, types and degenerate inputs."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.losses import koleo

SQUARE = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]]
SPREAD = [[3.0, 4, 0], [0, 5, 12], [1, 2, 2], [2, -1, 2], [-4, 0, 3]]


@pytest.mark.parametrize(("features", "expected"), [(SQUARE, 0.1703222206), (SPREAD, 0.3439188120)])
def test_equals_the_reference(features: list[list[float]], expected: float) -> None:
    assert float(koleo(torch.tensor(features))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identical_features_are_finite_in_every_type(dtype: torch.dtype) -> None:
    same = torch.ones(8, 1024, dtype=dtype)
    assert float(koleo(same)) == pytest.approx(14.924172, abs=1e-4)


def test_autocast_does_not_reach_it() -> None:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = koleo(x)
    assert inside.dtype == torch.float32
    assert float(inside) == float(koleo(x)) == pytest.approx(-0.31, abs=0.02)


def test_gradient_flows_to_both_ends_of_a_pair() -> None:
    x = torch.tensor(SQUARE, requires_grad=True)
    koleo(x).backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(1) > 0).all()


def test_one_feature_alone_costs_nothing() -> None:
    x = torch.ones(1, 4, requires_grad=True)
    koleo(x).backward()
    assert float(koleo(x)) == 0.0


def test_groups_do_not_know_of_each_other() -> None:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = torch.stack([koleo(part) for part in x.split(4)])
    torch.testing.assert_close(koleo(x, group=4), parts.mean())
    torch.testing.assert_close(koleo(x[:4], group=4), parts[0])
    assert abs(float(koleo(x, group=4) - koleo(x))) > 1e-2
    assert float(koleo(torch.tensor(SQUARE), group=2)) == pytest.approx(-0.464074, abs=1e-6)


def test_more_neighbours_push_too() -> None:
    assert float(koleo(torch.tensor(SQUARE), neighbours=2)) == pytest.approx(-0.060233, abs=1e-6)
    x = torch.tensor(SQUARE, dtype=torch.float64)
    torch.testing.assert_close(koleo(x, neighbours=9), koleo(x, neighbours=3))  # no feature is its own neighbour
    assert float(koleo(x, neighbours=3)) < 0.0


def test_a_group_that_does_not_come_out_is_refused() -> None:
    with pytest.raises(ValueError, match="4 features are not divisible into groups of 3"):
        koleo(torch.tensor(SQUARE), group=3)


def test_permuting_the_features_changes_nothing() -> None:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(koleo(x), koleo(x[torch.randperm(9, generator=torch.Generator().manual_seed(1))]))


@pytest.mark.parametrize("neighbours", [1, 3])
def test_neighbours_are_chosen_in_full_precision(neighbours: int) -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    nearest = (unit @ unit.T - 3 * torch.eye(64)).topk(neighbours, dim=1).indices
    plain = -(unit[:, None] - unit[nearest]).norm(dim=2).log().mean()
    assert float(koleo(x, neighbours=neighbours)) == pytest.approx(float(plain), abs=1e-6)


def test_no_features_and_a_group_of_one_cost_nothing_and_eps_bounds_the_loss() -> None:
    x = torch.tensor(SQUARE, requires_grad=True)
    for loss in (koleo(x[:0]), koleo(x, group=1)):
        loss.backward()
        assert float(loss) == 0.0 and loss.requires_grad
    same = torch.ones(2, 1)
    assert float(koleo(same, eps=1e-3)) == pytest.approx(-math.log(2e-3), abs=1e-4)
    assert koleo(same.half(), eps=1e-3).dtype == torch.float32
    assert koleo(same.double()).dtype == torch.float64
