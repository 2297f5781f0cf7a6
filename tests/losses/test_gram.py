"""Gram anchoring: the reference's value, and what it does not see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.losses import gram, resampled_patches

STUDENT = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
ANCHOR = torch.tensor([[[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]]])


def test_the_value_of_the_reference() -> None:
    assert float(gram(STUDENT, ANCHOR)) == pytest.approx(2 / 9, abs=1e-7)
    assert float(gram(STUDENT.bfloat16(), ANCHOR)) == pytest.approx(2 / 9, abs=1e-6)


def test_turning_and_scaling_features_costs_nothing_and_widths_may_differ() -> None:
    turn, _ = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))
    wider = torch.cat([STUDENT @ turn * 3.0, torch.zeros(1, 3, 5)], dim=2)
    assert float(gram(STUDENT, wider)) == pytest.approx(0.0, abs=1e-12)


def test_pictures_are_compared_by_themselves_and_gradients_reach_the_student_only() -> None:
    two = torch.cat([STUDENT, ANCHOR])
    assert float(gram(two, two.flip(0))) == pytest.approx(2 / 9, abs=1e-7)
    student, anchor = STUDENT.clone().requires_grad_(), ANCHOR.clone().requires_grad_()
    gram(student, anchor).backward()
    assert student.grad is not None and bool(student.grad.abs().sum() > 0) and anchor.grad is None


def cubic(rows: int, wanted: int) -> Tensor:
    """Keys' cubic kernel with a = -0.75 as a matrix ``[wanted, rows]``: pixel centres at halves, edges repeated."""
    a, matrix = -0.75, torch.zeros(wanted, rows, dtype=torch.float64)
    for n in range(wanted):
        at = (n + 0.5) * rows / wanted - 0.5
        base = math.floor(at)
        for tap in range(base - 1, base + 3):
            d = abs(at - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[n, min(max(tap, 0), rows - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return matrix


@pytest.mark.parametrize(("own", "side"), [(8, 4), (6, 4), (4, 6)])
def test_an_anchor_on_another_grid_is_resampled_by_the_plain_formula(own: int, side: int) -> None:
    generator = torch.Generator().manual_seed(own)
    anchor, student = torch.randn(2, own * own, 5, generator=generator), torch.randn(2, side * side, 3, generator=generator)
    matrix = cubic(own, side)
    plain = torch.einsum("ia,jb,nabc->nijc", matrix, matrix, anchor.double().unflatten(1, (own, own))).flatten(1, 2)
    found = resampled_patches(anchor, side)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), plain, atol=1e-5)

    def cosines(x: Tensor) -> Tensor:
        x = x.double() / x.double().norm(dim=-1, keepdim=True)
        return x @ x.transpose(1, 2)

    expected = (cosines(student) - cosines(plain)).square().mean()
    assert float(gram(student, found)) == pytest.approx(float(expected), rel=1e-5)


def test_twice_the_grid_by_hand_and_the_same_grid_untouched() -> None:
    ramp = torch.arange(16.0).reshape(4, 4)  # value 4 * row + column
    found = resampled_patches(ramp.reshape(1, 16, 1), 2).reshape(2, 2)
    # Halfway between neighbours: weights -0.09375, 0.59375, 0.59375, -0.09375, the edge repeated, give 0.40625 and 2.59375.
    assert torch.allclose(found, torch.tensor([[0.40625 * 5, 0.40625 * 4 + 2.59375], [2.59375 * 4 + 0.40625, 2.59375 * 5]]))
    patches = torch.randn(1, 16, 3).bfloat16()
    assert resampled_patches(patches, 4) is patches
