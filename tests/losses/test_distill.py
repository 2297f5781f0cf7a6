"""Cross-entropies of DINO and iBOT: reference vectors and identities."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.losses import cross_entropy, masked_patches, multi_crop


def _waves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    i = torch.arange(12, dtype=torch.float64)
    targets = torch.softmax((0.3 * torch.sin(i)).reshape(2, 2, 3) / 0.07, -1)
    return (0.3 * torch.cos(i)).reshape(2, 2, 3), (0.3 * torch.sin(1.7 * i)).reshape(2, 2, 3), targets


def test_multi_crop_equals_the_reference() -> None:
    student_global, student_local, targets = _waves()
    local, glob = multi_crop(student_global, student_local, targets)
    assert float(local) == pytest.approx(1.626660361, abs=1e-6)
    assert float(glob) == pytest.approx(1.102832260, abs=1e-6)
    assert float(local + glob) == pytest.approx(2.729492622, abs=1e-6)


def test_multi_crop_without_local_crops_is_the_mean_of_two_pairs() -> None:
    student_global, _, targets = _waves()
    local, glob = multi_crop(student_global, student_global[:0], targets)
    assert float(local) == 0.0
    assert float(glob) == pytest.approx(6.616993562 / 2, abs=1e-6)


@pytest.mark.parametrize("crops", [0, 1, 8])
def test_coefficients_sum_to_one(crops: int) -> None:
    k = 7
    local, glob = multi_crop(torch.zeros(2, 3, k), torch.zeros(crops, 3, k), torch.full((2, 3, k), 1 / k))
    assert float(local + glob) == pytest.approx(math.log(k), abs=1e-5)


def test_a_global_crop_never_meets_its_own_target() -> None:
    student = torch.zeros(2, 1, 4, requires_grad=True)
    targets = torch.eye(4)[None, :2].transpose(0, 1)
    _, glob = multi_crop(student, torch.zeros(0, 1, 4), targets)
    glob.backward()
    assert student.grad is not None
    assert student.grad[0, 0].argmin() == 1
    assert student.grad[1, 0].argmin() == 0


def test_permuting_the_images_changes_nothing() -> None:
    student_global, student_local, targets = _waves()
    whole = sum(multi_crop(student_global, student_local, targets))
    swapped = sum(multi_crop(student_global.flip(1), student_local.flip(1), targets.flip(1)))
    torch.testing.assert_close(whole, swapped)


def test_masked_patches_equal_the_reference() -> None:
    student = torch.tensor([[0.1, 0, 0], [0, 0.1, 0], [0.1, 0, 0]])
    targets = torch.softmax(torch.diag(torch.tensor([1.0, 2.0, 3.0])) / 0.5, -1)
    each = cross_entropy(student, targets)
    torch.testing.assert_close(each, torch.tensor([0.764458669, 0.586781559, 1.548978188]), atol=1e-6, rtol=0)
    loss = masked_patches(student, targets, torch.tensor([0.5, 0.5, 1.0]), crops=4)
    assert float(loss) == pytest.approx(0.556149576, abs=1e-6)


def test_no_masked_patch_at_all_gives_a_zero_with_a_graph() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = masked_patches(student, torch.zeros(0, 5), torch.zeros(0), crops=4)
    loss.backward()
    assert float(loss) == 0.0


def test_half_precision_logits_are_compared_in_fp32() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.softmax(logits.float(), -1)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), targets))
