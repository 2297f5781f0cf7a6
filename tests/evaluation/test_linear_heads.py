"""Linear classifiers trained at several rates at once: against torch's SGD, one classifier at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.order.random import permutation
from pipeline.evaluation.linear_heads import gather_positions, held_out_mask, train_heads

N, TOKENS, WIDTH, CLASSES, EPOCHS, BATCH = 11, 2, 3, 4, 3, 4


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def samples() -> tuple[Tensor, Tensor]:
    """Features with means and deviations of their own, and shares of classes; some tokens have none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, TOKENS, WIDTH, generator=generator) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([3.0, 0.0, -1.0])
    x = torch.cat([x, torch.full((N, TOKENS, 1), 7.0)], dim=2)  # a channel without deviation
    shares = torch.rand(N, TOKENS, CLASSES, generator=generator)
    shares = shares / shares.sum(2, keepdim=True)
    shares[::3, 0] = 0.0
    return x, shares


def reference(x: Tensor, shares: Tensor, rate: float, batch: int) -> tuple[Tensor, Tensor]:
    flat = x.double().flatten(0, 1)
    x = (x.double() - flat.mean(0)) / flat.std(0, correction=0).clamp(min=1e-6)
    weight, bias = (torch.zeros(*size, dtype=torch.float64, requires_grad=True) for size in ((CLASSES, WIDTH + 1), (CLASSES,)))
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)
    done, steps = 0, EPOCHS * math.ceil(N / batch)
    for epoch in range(EPOCHS):
        order = permutation(N, 5, 0x4EAD + epoch)
        for low in range(0, N, batch):
            rows = torch.from_numpy(order[low : low + batch])
            targets = shares[rows].double()
            logits = x[rows] @ weight.T + bias
            loss = -(targets * logits.log_softmax(-1)).sum() / targets.sum().clamp(min=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = rate * batch / 256 * (1 + math.cos(math.pi * done / steps)) / 2
            optimizer.step()
            done += 1
    return weight.detach(), bias.detach()


@pytest.mark.parametrize("batch", [BATCH, 100])
def test_each_rate_is_a_run_of_sgd_with_momentum_and_a_cosine(batch: int) -> None:
    x, shares = samples()
    rates = (100.0, 3.0)
    heads = train_heads(x, shares, torch.arange(N), order=torch.arange(N), rates=rates, epochs=EPOCHS, batch=batch, seed=5)
    for number, rate in enumerate(rates):
        weight, bias = reference(x, shares, rate, min(batch, N))
        torch.testing.assert_close(heads.weight[number].double(), weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(heads.bias[number].double(), bias, rtol=1e-3, atol=1e-5)
    flat = x.flatten(0, 1)
    logits = heads(flat)
    assert logits.shape == (2, N * TOKENS, CLASSES)
    standard = (flat - flat.mean(0)) / flat.std(0, correction=0).clamp(min=1e-6)
    torch.testing.assert_close(logits[1], standard @ heads.weight[1].T + heads.bias[1], rtol=1e-3, atol=1e-4)


def test_samples_are_known_by_their_positions() -> None:
    x, shares = samples()
    arguments = {"rates": (1.0,), "epochs": 2, "batch": 3, "seed": 1}
    places = torch.arange(N) * 2 + 1
    plain = train_heads(x, shares, torch.arange(N), order=torch.arange(N), **arguments)  # type: ignore[arg-type]
    moved = train_heads(x.flip(0), shares.flip(0), places.flip(0), order=places, **arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(moved.weight, plain.weight)


def test_without_samples_the_classifiers_stay_at_zero() -> None:
    x, shares = samples()
    nothing = torch.arange(0)
    heads = train_heads(x[:0], shares[:0], nothing, order=nothing, rates=(1.0,), epochs=2, batch=3)
    assert not heads(x.flatten(0, 1)).any()


@pytest.mark.parametrize(("total", "share", "count"), [(10, 0.3, 3), (10, 0.0, 1), (10, 1.0, 9), (2, 0.5, 1), (7, 0.5, 4)])
def test_the_held_out_part_is_never_nothing_and_never_all(total: int, share: float, count: int) -> None:
    mask = held_out_mask(total, share)
    assert mask.shape == (total,) and int(mask.sum()) == count
    assert torch.equal(mask, held_out_mask(total, share, 0))
    assert mask.nonzero().squeeze(1).tolist() == sorted(permutation(total, 0, 0x8E1D)[:count].tolist())


def test_positions_come_together_in_order() -> None:
    assert gather_positions(torch.tensor([4, 0, 2]), 6, None).tolist() == [0, 2, 4]
