"""Batch norm over ranks is batch norm over the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.models.norms import GlobalBatchNorm, batch_statistics, normalises_batches
from tests.helpers.rank_pool import pool

SHAPES = {"rows": (6, 3), "maps": (6, 3, 2, 4)}


def normed(kind: str) -> dict[str, Any]:
    """Two steps' worth of passes over this rank's share: outputs, slopes, means."""
    torch.manual_seed(0)
    norm = GlobalBatchNorm(3)
    nn.init.normal_(norm.weight)
    each = []
    share = 6 // dist.get_world_size()
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x = (1 + 2 * torch.randn(*SHAPES[kind], generator=generator))[rows].requires_grad_()
        y = norm(x)
        (y**3).sum().backward()
        each.append((y.detach(), x.grad))
    assert norm.weight.grad is not None and norm.bias.grad is not None
    slopes = torch.stack([norm.weight.grad, norm.bias.grad])
    dist.all_reduce(slopes)
    return {"each": each, "slopes": slopes, "buffers": dict(norm.named_buffers())}


@pytest.mark.parametrize("kind", SHAPES)
def test_two_ranks_normalise_as_one(kind: str) -> None:
    (whole,) = pool(1).run(normed, kind=kind)
    ranks = pool(2).run(normed, kind=kind)
    for step, (y, slope) in enumerate(whole["each"]):
        for index, expected in ((0, y), (1, slope)):
            found = torch.cat([rank["each"][step][index] for rank in ranks])
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    for rank in ranks:
        torch.testing.assert_close(rank["slopes"], whole["slopes"], atol=1e-5, rtol=1e-5)
        for name, value in whole["buffers"].items():
            torch.testing.assert_close(rank["buffers"][name], value)


def test_a_pass_with_the_batchs_own_statistics_leaves_the_running_ones_alone() -> None:
    norm = GlobalBatchNorm(3).eval()
    x = 5 + torch.randn(8, 3)
    with batch_statistics(norm):
        inside = norm(x)
    torch.testing.assert_close(inside.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert not norm.training and norm.momentum == 0.1
    torch.testing.assert_close(norm(x), x / (1 + norm.eps) ** 0.5)
    assert normalises_batches(nn.Sequential(norm)) and not normalises_batches(nn.Linear(2, 2))
