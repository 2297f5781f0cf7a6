"""LARS and LAMB: the vectors of their papers' formulas, and on sharded weights the same as on whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.training.optimizers import Lamb, Lars, Layerwise, Segment, Sgd
from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import by_torch
from tests.training.test_engine import STEPS, _train, compare, mean_terms


def whole(optimizer: Layerwise) -> Layerwise:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.segments = {id(p): [Segment(number, 0, p.numel())] for number, p in enumerate(parameters)}
    optimizer.parameters = len(parameters)
    return optimizer


def test_two_steps_of_lars_are_those_of_the_formula() -> None:
    w = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    groups = [{"params": [w], "weight_decay": 1e-4}, {"params": [b], "adapt": False}]
    optimizer = whole(Lars(groups, momentum=0.9, trust=1e-3))
    expected = [
        ([0.9956166149, 2.0087492543, 1.9868542236, 3.9824664594], [-0.46, -0.98]),
        ([1.0000283826, 2.0094862679, 1.9809322787, 3.9649824409], None),
    ]
    gradients = [([[0.1, -0.2], [0.3, 0.4]], [0.2, 0.1]), ([[-0.2, 0.1], [0.0, 0.3]], [-0.1, 0.3])]
    for (gw, gb), (want_w, want_b), lr in zip(gradients, expected, (4.8, 2.4), strict=True):
        w.grad, b.grad = torch.tensor(gw, dtype=torch.float64), torch.tensor(gb, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        # The ratio is rounded to fp32, as weights are.
        torch.testing.assert_close(w.detach().flatten(), torch.tensor(want_w, dtype=torch.float64), atol=3e-8, rtol=0)
        if want_b is not None:
            torch.testing.assert_close(b.detach(), torch.tensor(want_b, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_step_of_lamb_is_adams_direction_scaled_to_the_weights_norm() -> None:
    w = torch.tensor([[3.0, 0.0], [0.0, 4.0]], requires_grad=True)
    v = torch.tensor([1.0, 1.0], requires_grad=True)
    optimizer = whole(Lamb([{"params": [w], "weight_decay": 0.1}, {"params": [v], "adapt": False}], betas=(0.9, 0.999), eps=0.0))
    w.grad, v.grad = torch.tensor([[2.0, -1.0], [1.0, 3.0]]), torch.tensor([5.0, -5.0])
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    before = w.detach().clone()
    optimizer.step()
    # After one step Adam's direction is the gradient's sign.
    direction = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) + 0.1 * before
    torch.testing.assert_close(w.detach(), before - 0.01 * (5.0 / direction.norm()) * direction)
    torch.testing.assert_close(v.detach(), torch.tensor([0.99, 1.01]))


def test_gradient_descent_is_torchs() -> None:
    torch.manual_seed(0)
    start, slopes = torch.randn(3, 4), torch.randn(3, 3, 4)
    results = []
    for ours in (True, False):
        w = start.clone().requires_grad_()
        groups = [{"params": [w], "lr": 0.1, "weight_decay": 0.02}]
        optimizer: torch.optim.Optimizer = whole(Sgd(groups, momentum=0.9)) if ours else torch.optim.SGD(groups, momentum=0.9)
        for slope in slopes:
            w.grad = slope.clone()
            optimizer.step()
        results.append(w.detach())
    torch.testing.assert_close(*results)


def test_a_weight_or_direction_of_zero_is_not_scaled() -> None:
    w = torch.zeros(2, 2, requires_grad=True)
    optimizer = whole(Lars([w], trust=1e-3))
    w.grad = torch.ones(2, 2)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert torch.equal(w.detach(), -torch.ones(2, 2))


@pytest.mark.parametrize("optimizer", [Lars, Lamb, Sgd])
def test_a_weight_without_gradient_and_decay_stays(optimizer: type[Layerwise]) -> None:
    w = torch.ones(2, 2, requires_grad=True)
    w.grad = torch.zeros(2, 2)
    whole(optimizer([{"params": [w], "lr": 1.0}])).step()
    assert torch.equal(w.detach(), torch.ones(2, 2))


def test_the_defaults_are_the_papers() -> None:
    w = [torch.ones(1, requires_grad=True)]
    common = {"lr": 0.0, "weight_decay": 0.0, "adapt": True}
    assert Lamb(w).defaults == {**common, "betas": (0.9, 0.999), "eps": 1e-6}
    assert Lars(w).defaults == Sgd(w).defaults == {**common, "momentum": 0.9}
    assert (Lars(w).trust, Lars(w).sharded, Lars(w).parameters) == (1e-3, False, 0)


def test_lambs_direction_is_adams() -> None:
    torch.manual_seed(0)
    start, gradients, results = torch.randn(3, 4), torch.randn(4, 3, 4), []
    for ours in (True, False):
        w = start.clone().requires_grad_()
        groups = [{"params": [w], "lr": 0.1, "adapt": False}]
        optimizer: torch.optim.Optimizer = whole(Lamb(groups)) if ours else torch.optim.Adam([w], lr=0.1, eps=1e-6)
        for gradient in gradients:
            w.grad = gradient.clone()
            optimizer.step()
        results.append(w.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_sharded_by_any_stage_it_is_what_it_is_in_one_piece(zero: int, optimizer: str) -> None:
    ranks: list[dict[str, Any]] = pool(2).run(_train, zero=zero, optimizer=optimizer)
    reference = by_torch(STEPS, clip=None, scope="network", optimizer_name=optimizer)
    for index in range(STEPS):
        for name, value in mean_terms(ranks, index).items():
            assert value == pytest.approx(reference["terms"][index][name], abs=2e-6)
    compare(ranks, reference)
