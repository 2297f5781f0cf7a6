"""The numbers of the methods' losses, worked out apart from this code in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import losses
from tests.helpers.rank_pool import pool

Z1 = torch.tensor([[1, 2, 3], [-1, 0, 2], [0.5, -1, 1], [2, -2, 0]], dtype=torch.float64)
Z2 = torch.tensor([[1.5, 1.5, 3], [-0.5, 0.5, 2], [1, -1, 0.5], [2, -1, -1]], dtype=torch.float64)
Q1, Q2, T1, T2 = Z1, Z2.flip(1), Z1 + 0.5, Z2 - 0.25


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 1.088208510593), (0.1, 0.415917267761)])
def test_nt_xent(temperature: float, expected: float) -> None:
    assert float(losses.nt_xent(Z1, Z2, temperature)) == pytest.approx(expected, abs=1e-12)


def test_nt_xent_of_two_pictures_and_its_slope() -> None:
    first, second = torch.tensor([[1.0, 0, 0], [0, 1, 1]]).double(), torch.tensor([[1.0, 1, 0], [0, 2, 1]]).double()
    assert float(losses.nt_xent(first, second, 0.5)) == pytest.approx(0.571012498462, abs=1e-12)
    z = Z1.clone().requires_grad_()
    losses.nt_xent(z, Z2, 0.5).backward()
    expected = [
        [-0.0271708925, -0.0232555016, 0.0245606319],
        [0.0467381330, -0.0312143366, 0.0233690665],
        [-0.0534404589, 0.0693316038, 0.0960518333],
        [-0.0240527898, -0.0240527898, 0.1109763012],
    ]
    torch.testing.assert_close(z.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


def test_nt_xent_of_a_guess_is_the_logarithm_of_the_other_views() -> None:
    same = torch.ones(4, 3)
    assert float(losses.nt_xent(same, same, 0.5)) == pytest.approx(math.log(7), abs=1e-6)


def share(rank_rows: int) -> tuple[float, Tensor]:
    import torch.distributed as dist

    rows = slice(dist.get_rank() * rank_rows, (dist.get_rank() + 1) * rank_rows)
    first, second = Z1[rows].clone().requires_grad_(), Z2[rows]
    loss = losses.nt_xent(first, second, 0.5)
    loss.backward()
    assert first.grad is not None
    return float(loss.detach()), first.grad


def test_nt_xent_of_two_ranks_is_that_of_one_with_its_slope() -> None:
    (one, d_one), (two, d_two) = pool(2).run(share, rank_rows=2)
    assert (one, two) == pytest.approx((1.034399704834, 1.142017316351), abs=1e-12)
    whole = Z1.clone().requires_grad_()
    losses.nt_xent(whole, Z2, 0.5).backward()
    torch.testing.assert_close(torch.cat([d_one, d_two]) / 2, whole.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(0.2, (0.158061768216, 1.060718506186)), (1.0, (1.847890730463, 3.059647420620))]
)
def test_moco_v3(temperature: float, expected: tuple[float, float]) -> None:
    found = [float(losses.momentum_contrast(q, k, 0, temperature)) for q, k in ((Q1, T2), (Q2, T1))]
    assert found == pytest.approx(expected, abs=1e-12)


def test_moco_v3s_keys_are_found_from_the_first_on() -> None:
    whole = losses.momentum_contrast(Q1, T2, 0, 0.2)
    halves = [losses.momentum_contrast(Q1[i : i + 2], T2, i, 0.2) for i in (0, 2)]
    assert float(sum(halves)) / 2 == pytest.approx(float(whole), abs=1e-12)


def test_moco_v2() -> None:
    queue = torch.tensor([[0.0, 0, 1], [1, 1, 1]]).double()
    assert float(losses.queue_contrast(Q1, T2, queue, 0.2)) == pytest.approx(0.417468034104, abs=1e-12)


def test_byol() -> None:
    found = [float(losses.cosine_regression(q, t)) for q, t in ((Q1, T2), (Q2, T1))]
    assert found == pytest.approx([0.165620835058, 1.332708638010], abs=1e-12)


def test_targets_have_no_slope() -> None:
    for loss in (losses.cosine_regression, lambda q, t: losses.momentum_contrast(q, t, 0, 0.2)):
        target = T1.clone().requires_grad_()
        loss(Q1.clone().requires_grad_(), target).backward()
        assert target.grad is None


def test_logo() -> None:
    same, different = torch.tensor([-0.5, 0.25, 1.5, 0]), torch.tensor([0.3, -1, 0.7, 2])
    assert float(losses.same_or_not(same, different)) == pytest.approx(1.710576963629, abs=1e-6)
    assert float(losses.repulsion(same)) == pytest.approx(0.923644215650, abs=1e-6)


def test_one_joint_order_of_the_pictures_is_as_good_as_another() -> None:
    order = torch.tensor([2, 0, 3, 1])
    for loss in (
        lambda a, b: losses.nt_xent(a, b, 0.5),
        lambda a, b: losses.momentum_contrast(a, b, 0, 0.2),
        losses.cosine_regression,
    ):
        assert float(loss(Q1[order], T2[order])) == pytest.approx(float(loss(Q1, T2)), abs=1e-12)


def test_dino() -> None:
    teacher = torch.tensor([[1, 0.5, 0, -0.5, 2], [0.5, 1, 0.2, 0, 1.5]])
    student = torch.tensor([[0.9, 0.4, 0.1, -0.2, 1.2], [0.3, 0.8, 0.3, 0.1, 1], [0.2, 0.6, 0.9, 0.1, 0.7]])
    center, eye = torch.tensor([0.1, 0.2, 0, -0.1, 0.4]), torch.eye(5)
    targets = losses.Targets(teacher[:, None], eye, -center / 0.04, 0.04)
    pairings = losses.multi_crop_pairings(1)
    terms, _ = losses.prototype_cross_entropy(student[:, None], eye, targets, pairings, torch.full((1,), 0.25), 0.1)
    assert float(terms.sum()) == pytest.approx(1.131084151483, abs=1e-6)
    moved = losses.moved_center(center, losses.global_mean(teacher.sum(0), 2), 0.9)
    torch.testing.assert_close(moved, torch.tensor([0.165, 0.255, 0.01, -0.115, 0.535]))


def test_a_caption_is_told_token_by_token_and_padding_is_none() -> None:
    from pipeline.methods.shared.captioning import prediction_mask

    tokens = torch.tensor([[1, 3, 4, 2, 0], [1, 5, 2, 0, 0]])
    b, place, v = torch.arange(2)[:, None, None], torch.arange(5)[:, None], torch.arange(6)
    logits = torch.sin(1 + 30 * b.double() + 6 * place + v)
    marked = tokens.masked_fill(tokens == 2, 49407)  # the end mark that the data side writes

    def loss(prefix: Tensor | int) -> float:
        mask = prediction_mask(marked, prefix)
        hidden = logits[:, :-1][mask]
        return float(losses.token_cross_entropy(hidden, torch.eye(6).double(), tokens[:, 1:][mask], rows=2)) / int(mask.sum())

    assert loss(1) == pytest.approx(2.271976137759, abs=1e-12)  # CoCa, and SimVLM with the start mark alone
    assert loss(torch.tensor([2, 2])) == pytest.approx(1.842889618561, abs=1e-12)
    assert loss(torch.tensor([3, 3])) == pytest.approx(1.395502585666, abs=1e-12)


def test_token_cross_entropys_slopes_are_those_of_torch() -> None:
    torch.manual_seed(0)
    hidden, matrix = torch.randn(7, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    targets, slopes = torch.randint(9, (7,)), []
    for own in (True, False):
        h, m = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
        loss = losses.token_cross_entropy(h, m, targets, rows=3) if own else F.cross_entropy(h @ m.T, targets, reduction="sum")
        (loss / 5).backward()
        slopes.append((loss.detach(), h.grad, m.grad))
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert float(losses.token_cross_entropy(hidden[:0], matrix, targets[:0])) == 0.0


def test_byols_momentum_is_the_papers() -> None:
    from pipeline.training.schedules import Curve

    curve = Curve(0.996, 0.996, 1.0, 0, 1000)
    found = [curve.at(step, 1) for step in (0, 250, 500, 750, 1000)]
    assert found == pytest.approx([0.996, 0.996585786438, 0.998, 0.999414213562, 1.0], abs=1e-12)


@pytest.mark.parametrize("wide", [False, True])
def test_token_cross_entropys_types_and_the_gradients_that_are_wanted(wide: bool) -> None:
    kind = torch.float64 if wide else torch.bfloat16
    torch.manual_seed(0)
    hidden, matrix, targets = torch.randn(5, 4, dtype=kind), torch.randn(9, 4, dtype=torch.float32), torch.randint(9, (5,))
    both = []
    for of_hidden, of_matrix in ((True, True), (True, False), (False, True)):
        h, m = hidden.clone().requires_grad_(of_hidden), matrix.clone().requires_grad_(of_matrix)
        loss = losses.token_cross_entropy(h, m, targets, rows=2)
        loss.backward()
        assert loss.dtype == (torch.float64 if wide else torch.float32)
        both.append((h.grad, m.grad))
        assert (h.grad is not None, m.grad is not None) == (of_hidden, of_matrix)
    assert both[0][0] is not None and both[0][0].dtype == kind
    assert both[0][1] is not None and both[0][1].dtype == torch.float32
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[2][1])  # type: ignore[arg-type]
    assert not losses.token_cross_entropy(hidden, matrix, targets).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses.token_cross_entropy(hidden, matrix, targets)
    assert float(inside) == float(losses.token_cross_entropy(hidden, matrix, targets))


def test_a_caption_loss_is_the_same_to_the_last_bit_when_the_number_of_predicted_tokens_is_known() -> None:
    from pipeline.methods.shared.captioning import caption_nll, prediction_mask
    from pipeline.models.captions import Vocabulary

    torch.manual_seed(0)
    vocabulary = Vocabulary(30, 8)
    tokens = torch.randint(1, 30, (4, 9)).scatter_(1, torch.tensor([[8], [3], [5], [2]]), 49407)
    mask = prediction_mask(tokens, torch.tensor([1, 2, 5, 1]))
    results = []
    for count in (None, int(mask.sum())):
        states = torch.linspace(-2, 3, 4 * 9 * 8).sin().view(4, 9, 8).requires_grad_()
        loss = caption_nll(states, tokens % 30, mask, vocabulary, 4, count)
        results.append((loss, *torch.autograd.grad(loss, [states, *vocabulary.parameters()])))
    assert int(mask.sum()) == 8 + 2 + 1 + 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
