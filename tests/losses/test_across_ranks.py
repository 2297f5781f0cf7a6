"""Losses whose global batch is spread over ranks: two real gloo processes against one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pipeline.losses import (
    batch_center,
    centered_targets,
    clip_loss,
    gathered,
    global_mean,
    koleo,
    koleo_across_ranks,
    mean_over_ranks,
    moved_center,
    nt_xent,
    siglip_loss,
    sinkhorn,
    sinkhorn_potential,
)
from tests.helpers.rank_pool import pool
from tests.losses.test_koleo import SQUARE
from tests.losses.test_sinkhorn import WARM, X


def _rank() -> dict[str, torch.Tensor]:
    rank = dist.get_rank()
    half, ragged, one_sided = X[2 * rank : 2 * rank + 2], (X[:3], X[3:])[rank], (X, X[:0])[rank]
    out = {
        "half": sinkhorn(half, 0.07),
        "ragged": sinkhorn(ragged, 0.07),
        "one_sided": sinkhorn(one_sided, 0.07),
        "potential": sinkhorn_potential(ragged, 0.07),
        "nothing": sinkhorn(X[:0], 0.07),
        "ibot_center": moved_center(torch.zeros(3), batch_center(ragged)),
    }
    features = torch.tensor(SQUARE)[2 * rank : 2 * rank + 2].requires_grad_()
    spread = koleo_across_ranks(features)
    spread.backward()
    assert features.grad is not None
    out |= {
        "koleo": spread.detach(),
        "koleo_slope": features.grad / 2,  # an engine takes the mean over ranks
        "koleo_pairs": koleo_across_ranks(features, group=2).detach(),
        "koleo_two": koleo_across_ranks(features, neighbours=2).detach(),
        "mean": mean_over_ranks(torch.tensor([1.0, 2.0]) * (3 * rank + 1)),
        "even_center": global_mean(ragged.sum(0), len(ragged)),
    }
    center = torch.zeros(3)
    for factor in (1, 2, 3):
        out[f"targets_{factor}"] = centered_targets(factor * half, center, 0.07)
        center = moved_center(center, batch_center(factor * half))
    out["center"] = center
    return out


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, torch.Tensor]]:
    return pool(2).run(_rank)


@pytest.mark.parametrize("split", ["half", "ragged", "one_sided"])
def test_sinkhorn_of_two_ranks_equals_that_of_one(ranks: list[dict[str, torch.Tensor]], split: str) -> None:
    together = torch.cat([rank[split] for rank in ranks])
    torch.testing.assert_close(together, WARM, atol=1e-6, rtol=0)
    rank_local = torch.tensor([[0.235419, 0.139323, 0.625258], [0.423471, 0.511935, 0.064595]])
    assert (together[:2] - rank_local).abs().max() > 0.03


def test_every_rank_holds_the_same_potential(ranks: list[dict[str, torch.Tensor]]) -> None:
    assert torch.equal(ranks[0]["potential"], ranks[1]["potential"])


def test_a_step_without_any_masked_patch_gives_no_targets(ranks: list[dict[str, torch.Tensor]]) -> None:
    assert [tuple(rank["nothing"].shape) for rank in ranks] == [(0, 3), (0, 3)]


def test_centres_follow_the_reference(ranks: list[dict[str, torch.Tensor]]) -> None:
    expected = torch.tensor([[0.926121, 0.012521, 0.061358], [0.946401, 0.053392, 0.000207]])
    torch.testing.assert_close(ranks[0]["targets_2"], expected, atol=1e-6, rtol=0)
    for rank in ranks:
        torch.testing.assert_close(rank["center"], torch.tensor([0.049088, 0.056100, -0.007013]), atol=1e-6, rtol=0)


def test_the_patch_centre_is_the_mean_of_rank_means(ranks: list[dict[str, torch.Tensor]]) -> None:
    torch.testing.assert_close(ranks[0]["ibot_center"], torch.tensor([0.0025, 0.016667, 0.0025]), atol=1e-6, rtol=0)


def test_a_mean_over_rows_does_not_depend_on_where_they_are(ranks: list[dict[str, torch.Tensor]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["even_center"], torch.tensor([0.0875, 0.1, -0.0125]), atol=1e-6, rtol=0)


def test_a_mean_over_ranks_is_that_of_all(ranks: list[dict[str, torch.Tensor]]) -> None:
    assert [rank["mean"].tolist() for rank in ranks] == [[2.5, 5.0]] * 2


def test_neighbours_are_looked_for_on_all_ranks(ranks: list[dict[str, torch.Tensor]]) -> None:
    whole = torch.tensor(SQUARE, requires_grad=True)
    koleo(whole).backward()
    for rank in ranks:
        assert float(rank["koleo"]) == pytest.approx(0.170322, abs=1e-6)
        assert float(rank["koleo_pairs"]) == pytest.approx(-0.464074, abs=1e-6)
        assert float(rank["koleo_two"]) == pytest.approx(-0.060233, abs=1e-6)
    assert whole.grad is not None
    torch.testing.assert_close(torch.cat([rank["koleo_slope"] for rank in ranks]), whole.grad)


def _alone() -> dict[str, list[torch.Tensor]]:
    """Losses and gradients among the ranks of a group of this rank alone, and without any ranks."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    group, rank = groups[dist.get_rank()], dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    first, second = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scale, bias = torch.tensor([[10.0], [-10.0]], dtype=torch.float64)

    def made(group: dist.ProcessGroup | None) -> list[torch.Tensor]:
        x = first.clone().requires_grad_()
        terms = [
            clip_loss(x, second, scale, group=group),
            siglip_loss(x, second, scale, bias, group=group),
            nt_xent(x, second, 0.5, group=group),
            koleo_across_ranks(x, ranks=group),
            sinkhorn(x.detach(), 0.1, group=group).sum(0),
            global_mean(first.sum(0), 3, group),
            batch_center(first, group),
            mean_over_ranks(first, group),
        ]
        sum(terms[:4], torch.zeros(())).backward()
        assert x.grad is not None
        return [*(term.detach() for term in terms), x.grad]

    within = made(group)
    with mock.patch.object(dist, "is_initialized", return_value=False):
        return {"within": within, "alone": made(None)}


def test_a_group_is_all_there_is_for_its_ranks() -> None:
    for rank in pool(2).run(_alone):
        for within, alone in zip(rank["within"], rank["alone"], strict=True):
            torch.testing.assert_close(within, alone)


def _reduced() -> list[torch.Tensor]:
    gradients = []
    for backend in ("gloo", "nccl"):  # gloo's fallback, and the collective that NCCL is given
        x = torch.arange(6.0).reshape(2, 3).requires_grad_()
        with mock.patch.object(dist, "get_backend", return_value=backend):
            (gathered(x) * torch.arange(12.0).reshape(4, 3) * (dist.get_rank() + 1)).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    return gradients


def test_gathered_rows_get_the_gradients_of_all_ranks() -> None:
    for rank, gradients in enumerate(pool(2).run(_reduced)):
        expected = 3 * torch.arange(12.0).reshape(4, 3)[2 * rank : 2 * rank + 2]
        assert [gradient.tolist() for gradient in gradients] == [expected.tolist()] * 2


def test_means_of_no_rows_are_zero_and_of_one_process_its_own() -> None:
    assert global_mean(torch.zeros(3), 0).tolist() == batch_center(torch.zeros(0, 3)).tolist() == [0.0] * 3
    assert global_mean(torch.tensor([3.0, 6.0]), 3).tolist() == batch_center(torch.tensor([[1.0, 2.0]])).tolist() == [1.0, 2.0]
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    mean = mean_over_ranks(x)
    assert mean.tolist() == [1.0, 2.0] and mean is not x and not mean.requires_grad
    assert moved_center(torch.zeros(2), torch.ones(2), 0.25).tolist() == [0.75, 0.75]
    assert moved_center(torch.zeros(2), torch.ones(2)).tolist() == pytest.approx([0.1, 0.1])
