"""Batch norm over ranks is batch norm over the whole batch."""

from __future__ import annotations

from typing import Any
from unittest import mock

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


JOINT = 7  # samples, of which ranks hold uneven shares


def _data(shape: tuple[int, ...], dtype: torch.dtype, mean: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = mean + 2 * torch.randn(JOINT, *shape, generator=generator, dtype=torch.float64)
    upstream = torch.randn(JOINT, *shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), upstream.to(dtype)


def _affine(norm: nn.Module) -> Any:
    if norm.weight is not None:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2.0, len(norm.weight)))
            norm.bias.copy_(torch.linspace(-1.0, 1.0, len(norm.bias)))
    return norm


def _uneven(shape: tuple[int, ...], dtype: torch.dtype, mean: float, affine: bool, last: bool) -> dict[str, Any]:
    """Output, gradients and running statistics of this rank's share; the collectives that it took."""
    norm = _affine(GlobalBatchNorm(shape[0], affine=affine).to(torch.float64 if dtype == torch.float64 else torch.float32))
    rows = slice(0, 5) if dist.get_rank() == 0 else slice(5, JOINT)
    x, upstream = (
        each[rows].contiguous(memory_format=torch.channels_last) if last else each[rows] for each in _data(shape, dtype, mean)
    )
    x.requires_grad_()
    calls, all_reduce = [], dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", counted):
        y = norm(x)
        y.backward(upstream)
    slopes = torch.stack([norm.weight.grad, norm.bias.grad]) if affine else torch.zeros(2)
    dist.all_reduce(slopes)
    return {"y": y.detach(), "x": x.grad, "slopes": slopes, "buffers": dict(norm.named_buffers()), "calls": calls}


@pytest.mark.parametrize(
    ("shape", "dtype", "mean", "affine", "last"),
    [
        ((3,), torch.float64, 1.0, True, False),
        ((3, 2, 5), torch.float64, 1.0, True, False),
        ((3, 2, 5), torch.float64, 1.0, False, False),
        ((16, 3, 5), torch.float32, 1.0, True, True),
        ((16, 3, 5), torch.float32, 1000.0, True, False),
        ((16,), torch.float32, -3.0, False, False),
        ((16, 3, 5), torch.bfloat16, 2.0, True, False),
        ((16, 3, 5), torch.bfloat16, 2.0, True, True),
        ((16, 3, 5), torch.bfloat16, 2.0, False, False),
        ((16,), torch.bfloat16, -1.0, True, False),
    ],
)
def test_uneven_shares_of_a_batch_are_normalised_as_torch_does_the_whole(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float, affine: bool, last: bool
) -> None:
    x, upstream = (each.double() for each in _data(shape, dtype, mean))
    x.requires_grad_()
    kind = nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d
    norm = _affine(kind(shape[0], affine=affine).double())
    y = norm(x)
    y.backward(upstream)
    ranks = pool(2).run(_uneven, shape=shape, dtype=dtype, mean=mean, affine=affine, last=last)
    near = {torch.float64: 1e-12, torch.float32: 1e-6 * max(abs(mean), 2.0), torch.bfloat16: 0.03}[dtype]
    assert ranks[0]["y"].dtype == dtype
    torch.testing.assert_close(torch.cat([rank["y"] for rank in ranks]).double(), y.detach(), atol=near, rtol=near)
    torch.testing.assert_close(torch.cat([rank["x"] for rank in ranks]).double(), x.grad, atol=near, rtol=near)
    exact = 1e-12 if dtype == torch.float64 else 2e-6  # statistics and sums are fp32 also of a bf16 input
    for rank in ranks:
        assert rank["calls"] == [2 * shape[0] + 1, 2 * shape[0]]
        for name, value in norm.named_buffers():
            assert rank["buffers"][name].dtype in (torch.int64, torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(rank["buffers"][name].double(), value.double(), atol=exact, rtol=exact)
        if affine:
            assert norm.weight.grad is not None and norm.bias.grad is not None
            expected = torch.stack([norm.weight.grad, norm.bias.grad])
            torch.testing.assert_close(rank["slopes"].double(), expected, atol=10 * max(near, exact), rtol=max(near, exact))


def test_its_weights_have_the_names_of_torchs() -> None:
    norm = GlobalBatchNorm(3)
    assert norm.state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys() == nn.SyncBatchNorm(3).state_dict().keys()
    norm.load_state_dict(nn.SyncBatchNorm(3).state_dict())


def test_a_pass_with_the_batchs_own_statistics_leaves_the_running_ones_alone() -> None:
    norm = GlobalBatchNorm(3).eval()
    x = 5 + torch.randn(8, 3)
    with batch_statistics(norm):
        inside = norm(x)
    torch.testing.assert_close(inside.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert not norm.training and norm.momentum == 0.1
    torch.testing.assert_close(norm(x), x / (1 + norm.eps) ** 0.5)
    assert normalises_batches(nn.Sequential(norm)) and not normalises_batches(nn.Linear(2, 2))
