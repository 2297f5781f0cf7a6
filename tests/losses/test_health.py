"""The effective rank of features."""

from __future__ import annotations

import pytest
import torch

from pipeline.losses import effective_rank, spread


def test_it_counts_the_directions_that_features_vary_in() -> None:
    corners = torch.cat([torch.eye(6), -torch.eye(6)])
    assert float(effective_rank(corners)) == pytest.approx(6.0, abs=1e-4)
    flat = corners.clone()
    flat[:, 3:] = 0.0
    assert float(effective_rank(flat)) == pytest.approx(3.0, abs=1e-4)
    assert float(effective_rank(torch.outer(torch.arange(5.0), torch.randn(7)))) == pytest.approx(1.0, abs=1e-4)
    assert float(effective_rank(torch.ones(5, 7))) == 0.0


@pytest.mark.parametrize("shape", [(9, 20), (20, 9)])
def test_scale_offset_and_rotation_do_not_matter(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    turned = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(1)))[0]
    along = torch.linalg.eigvalsh((x - x.mean(0)).double().T @ (x - x.mean(0)).double())
    assert float(effective_rank(x)) == pytest.approx(float(along.sum() ** 2 / along.square().sum()), rel=1e-4)
    assert float(effective_rank(1e-3 * x @ turned + 5.0)) == pytest.approx(float(effective_rank(x)), rel=1e-2)


def test_spread_sees_features_move_together_where_their_rank_does_not() -> None:
    torch.manual_seed(0)
    apart, common = torch.randn(64, 16), torch.randn(1, 16)
    together = 100 * common + apart
    assert torch.allclose(effective_rank(apart), effective_rank(together), rtol=1e-3)
    assert spread(apart) > 0.9 and spread(together) < 1e-3
    assert spread(common.expand(8, 16)).abs() < 1e-6


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_squares_that_fp32_cannot_hold_do_not_matter(scale: float) -> None:
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    assert float(effective_rank(x * scale)) == pytest.approx(float(effective_rank(x)), rel=1e-5)
