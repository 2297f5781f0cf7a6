"""Gram anchoring: the reference's vector and what does not matter to it."""

from __future__ import annotations

import pytest
import torch

from pipeline.losses import gram


def test_equals_the_reference() -> None:
    student, teacher = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]]), torch.tensor([[[2.0, 0], [1, 1], [0, 3]]])
    assert float(gram(student, teacher)) == pytest.approx(2 / 9, abs=1e-6)
    assert float(gram(student.repeat(4, 1, 1), teacher.repeat(4, 1, 1))) == pytest.approx(2 / 9, abs=1e-6)


def test_lengths_rotations_and_the_order_of_patches_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, width, generator=generator, dtype=torch.float64) for width in (4, 6))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    order = torch.randperm(5, generator=generator)
    torch.testing.assert_close(gram(3 * student, teacher @ turn), gram(student[:, order], teacher[:, order]))
    assert float(gram(student, student @ turn[:4, :4] @ turn[:4, :4])) > 0.0
    assert float(gram(student, 2 * student)) == pytest.approx(0.0, abs=1e-12)


def test_only_the_student_is_moved_and_half_precision_is_compared_in_fp32() -> None:
    student, teacher = torch.randn(1, 3, 4).bfloat16().requires_grad_(), torch.randn(1, 3, 4, requires_grad=True)
    loss = gram(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and teacher.grad is None
    assert student.grad is not None and student.grad.any()
