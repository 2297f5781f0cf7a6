"""CLIP's and SigLIP's losses: reference values, gradients, chunks and ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses import clip_loss, siglip_loss
from tests.helpers.rank_pool import pool

K = torch.arange(1, 33, dtype=torch.float64)
X, Y = torch.sin(K).view(4, 8), torch.cos(0.5 * K).view(4, 8)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_clip_is_the_reference(chunk: int) -> None:
    x, y, t = leaf(X), leaf(Y), leaf(torch.tensor([math.log(1 / 0.07)], dtype=torch.float64))
    loss = clip_loss(unit(x), unit(y), t.exp(), chunk=chunk)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(4.4654374476, abs=1e-9)
    assert x.grad is not None and y.grad is not None and t.grad is not None
    row = [-0.30947853, -0.17176950, -0.06472432, 0.04688188, 0.20753333, 0.39406119, 0.50645475, 0.44230951]
    torch.testing.assert_close(x.grad[0], torch.tensor(row, dtype=torch.float64), atol=1e-7, rtol=0)
    row = [-0.56399130, -0.00607122, 0.51483075, 0.55682244, 0.11968512, -0.36432423, -0.43531992, -0.03224984]
    torch.testing.assert_close(y.grad[0], torch.tensor(row, dtype=torch.float64), atol=1e-7, rtol=0)
    assert float(x.grad.norm()) == pytest.approx(4.4343193127, abs=1e-9)
    assert float(y.grad.norm()) == pytest.approx(3.9419269637, abs=1e-9)
    assert float(t.grad) == pytest.approx(4.2379808445, abs=1e-9)
    assert float((X * x.grad).sum(1).abs().max()) < 1e-12


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_siglip_is_the_reference(chunk: int) -> None:
    x, t = leaf(X), leaf(torch.tensor([math.log(10)], dtype=torch.float64))
    bias = leaf(torch.tensor([-10.0], dtype=torch.float64))
    loss = siglip_loss(unit(x), unit(Y), t.exp(), bias, chunk=chunk)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(8.7344300271, abs=1e-9)
    assert x.grad is not None and t.grad is not None and bias.grad is not None
    row = [-0.36166158, -0.15645022, -0.01683868, 0.11076995, 0.29773711, 0.52138293, 0.64930449, 0.54318062]
    torch.testing.assert_close(x.grad[0], torch.tensor(row, dtype=torch.float64), atol=1e-7, rtol=0)
    assert float(t.grad) == pytest.approx(-1.2492256856, abs=1e-9)
    assert float(bias.grad) == pytest.approx(-0.9952496441, abs=1e-9)


def test_gradients_are_those_of_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    for ours in (True, False):
        x, y, s = leaf(features[0]), leaf(features[1]), leaf(torch.tensor([5.0], dtype=torch.float64))
        if ours:
            loss = clip_loss(x, y, s, chunk=2)
        else:
            logits, own = s * x @ y.T, torch.arange(7)
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        (3 * loss).backward()
        found = [loss.detach(), x.grad, y.grad, s.grad]
        if ours:
            expected = found
    torch.testing.assert_close(expected, found)


def test_unlike_features_of_large_logits_stay_finite_and_half_precision_is_widened() -> None:
    x, scale = unit(X).bfloat16(), torch.tensor([1e4])
    for loss in (clip_loss(x, -x, scale), siglip_loss(x, -x, scale, torch.zeros(1))):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        inside = clip_loss(unit(X).float(), unit(Y).float(), torch.tensor([1 / 0.07]))
    assert float(inside) == pytest.approx(4.4654374476, abs=1e-5)


def test_chance_is_the_logarithm_of_the_batch() -> None:
    same = unit(torch.ones(256, 4))
    assert float(clip_loss(same, same, torch.tensor([14.0]), chunk=100)) == pytest.approx(math.log(256), abs=1e-4)
    assert math.log(256) == pytest.approx(5.545, abs=1e-3)


def _share(kind: str) -> dict[str, Any]:
    """A rank's value and gradients, the latter as data-parallel training makes them: towers' and scale's mean over ranks."""
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    towers = [leaf(torch.eye(8, dtype=torch.float64) + 0.1), leaf(torch.eye(8, dtype=torch.float64))]
    t, bias = leaf(torch.tensor([math.log(10.0)], dtype=torch.float64)), leaf(torch.tensor([-10.0], dtype=torch.float64))
    x, y = unit(X[rows] @ towers[0]), unit(Y[rows] @ towers[1])
    loss = clip_loss(x, y, t.exp(), chunk=1) if kind == "clip" else siglip_loss(x, y, t.exp(), bias, chunk=1)
    loss.backward()
    gradients = [p.grad for p in (*towers, t) if p.grad is not None]
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    plain = clip_loss(unit(X[rows]), unit(Y[rows]), torch.tensor([1 / 0.07], dtype=torch.float64))
    sigmoid = siglip_loss(unit(X[rows]), unit(Y[rows]), *torch.tensor([[10.0], [-10.0]], dtype=torch.float64))
    return {"gradients": gradients, "clip": float(plain), "siglip": float(sigmoid)}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_ranks_have_the_gradient_of_one(kind: str) -> None:
    two = pool(2).run(_share, kind=kind)
    towers = [leaf(torch.eye(8, dtype=torch.float64) + 0.1), leaf(torch.eye(8, dtype=torch.float64))]
    t, bias = leaf(torch.tensor([math.log(10.0)], dtype=torch.float64)), leaf(torch.tensor([-10.0], dtype=torch.float64))
    x, y = unit(X @ towers[0]), unit(Y @ towers[1])
    (clip_loss(x, y, t.exp()) if kind == "clip" else siglip_loss(x, y, t.exp(), bias)).backward()
    for rank in two:
        for ours, parameter in zip(rank["gradients"], (*towers, t), strict=True):
            torch.testing.assert_close(ours, parameter.grad, atol=1e-14, rtol=1e-13)
    assert [rank["clip"] for rank in two] == pytest.approx([3.7526758529, 5.1781990425], abs=1e-9)
    assert [rank["siglip"] for rank in two] == pytest.approx([8.5250278761, 8.9438321781], abs=1e-9)


def test_a_batch_without_rows_costs_nothing() -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    for loss in (clip_loss(x, x, torch.ones(1)), siglip_loss(x, x, torch.ones(1), torch.zeros(1))):
        loss.backward()
        assert float(loss) == 0.0
