"""Losses make their tensors where their inputs are: on a CUDA device that torch only pretends to have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.losses import (
    batch_center,
    centered_targets,
    clip_loss,
    cosine_regression,
    global_mean,
    gram,
    koleo,
    masked_patches,
    mean_over_ranks,
    momentum_contrast,
    multi_crop,
    nt_xent,
    queue_contrast,
    resampled_patches,
    siglip_loss,
    sinkhorn,
    token_cross_entropy,
)

BATCH, WIDTH = 4, 6


def features(*shape: int) -> Tensor:
    return torch.empty(*(shape or (BATCH, WIDTH)), device="cuda", requires_grad=True)


def indices(n: int = BATCH) -> Tensor:
    return torch.empty(n, dtype=torch.int64, device="cuda")


CASES: dict[str, Callable[[], Tensor]] = {
    "clip": lambda: clip_loss(features(), features(), features(1), chunk=3),
    "siglip": lambda: siglip_loss(features(), features(), features(1), features(1), chunk=3),
    "nt_xent": lambda: nt_xent(features(), features(), 0.5),
    "momentum": lambda: momentum_contrast(features(), features(), 0, 0.5),
    "queue": lambda: queue_contrast(features(), features(), features(9, WIDTH), 0.5),
    "cosine": lambda: cosine_regression(features(), features()),
    "koleo": lambda: koleo(features(), group=2),
    "gram": lambda: gram(features(2, 9, 4), resampled_patches(features(2, 36, 4), 3)),
    "tokens": lambda: token_cross_entropy(features(), features(9, WIDTH), indices(), rows=3),
    "multi_crop": lambda: sum(multi_crop(features(2, 3, 5), features(4, 3, 5), features(2, 3, 5)), features(1).sum()),
    "masked": lambda: masked_patches(features(), features(), features(BATCH), 2),
    "sinkhorn": lambda: features(1).sum() * sinkhorn(features(), 0.1).sum(),
    "global_mean": lambda: features(1).sum() * global_mean(features(WIDTH), 3).sum(),
    "mean": lambda: features(1).sum() * mean_over_ranks(features()).sum(),
    "center": lambda: features(1).sum() * centered_targets(features(), batch_center(features()), 0.1).sum(),
}


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_no_loss_makes_a_tensor_elsewhere(name: str) -> None:
    with FakeTensorMode():
        assert CASES[name]().device.type == "cuda"
