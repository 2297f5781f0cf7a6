"""Losses make their tensors where their inputs are: on a CUDA device that torch only pretends to have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import losses

BATCH, WIDTH = 4, 6


def features(*shape: int) -> Tensor:
    return torch.empty(*(shape or (BATCH, WIDTH)), device="cuda", requires_grad=True)


def indices(n: int = BATCH) -> Tensor:
    return torch.empty(n, dtype=torch.int64, device="cuda")


CASES: dict[str, Callable[[], Tensor]] = {
    "clip": lambda: losses.clip_loss(features(), features(), features(1), chunk=3),
    "siglip": lambda: losses.siglip_loss(features(), features(), features(1), features(1), chunk=3),
    "nt_xent": lambda: losses.nt_xent(features(), features(), 0.5),
    "momentum": lambda: losses.momentum_contrast(features(), features(), 0, 0.5),
    "queue": lambda: losses.queue_contrast(features(), features(), features(9, WIDTH), 0.5),
    "cosine": lambda: losses.cosine_regression(features(), features()),
    "koleo": lambda: losses.koleo(features(), group=2),
    "gram": lambda: losses.gram(features(2, 9, 4), losses.resampled_patches(features(2, 36, 4), 3)),
    "tokens": lambda: losses.token_cross_entropy(features(), features(9, WIDTH), indices(), rows=3),
    "multi_crop": lambda: sum(losses.multi_crop(features(2, 3, 5), features(4, 3, 5), features(2, 3, 5)), features(1).sum()),
    "masked": lambda: losses.masked_patches(features(), features(), features(BATCH), 2),
    "sinkhorn": lambda: features(1).sum() * losses.sinkhorn(features(), 0.1).sum(),
    "center": lambda: features(1).sum() * losses.centered_targets(features(), losses.batch_center(features()), 0.1).sum(),
}


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_no_loss_makes_a_tensor_elsewhere(name: str) -> None:
    with FakeTensorMode():
        assert CASES[name]().device.type == "cuda"
