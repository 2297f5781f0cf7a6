"""Gram anchoring: the reference's value, and what it does not see."""

from __future__ import annotations

import pytest
import torch

from pipeline.losses import gram

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
