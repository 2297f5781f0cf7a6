"""Cross-entropies over prototypes in chunks: equal to the plain formulas, and never whole in memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.losses import (
    SAME_VIEW,
    Pairing,
    Products,
    Targets,
    kernels_for,
    logit_chunks,
    masked_patches,
    multi_crop,
    multi_crop_pairings,
    potential_over_chunks,
    prototype_cross_entropy,
    rows_per_chunk,
    sinkhorn_potential,
)
from tests.losses.test_sinkhorn import WARM, X

B, K, L, D = 7, 11, 3, 5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(seed: int = 0) -> tuple[Tensor, Tensor, Targets]:
    """Student features of two global and L local crops, its prototypes, and a teacher's targets."""
    targets = Targets(random(2, B, 4, seed=seed + 1), random(K, 4, seed=seed + 2), random(K, seed=seed + 3), 0.3)
    return random(2 + L, B, D, seed=seed + 4).requires_grad_(), random(K, D, seed=seed + 5).requires_grad_(), targets


def plain_targets(targets: Targets) -> Tensor:
    return torch.softmax(targets.unit @ targets.matrix.T / targets.temperature + targets.potential, -1)


def plain_cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 0.1) -> Tensor:
    return -(targets * torch.log_softmax(logits / temperature, -1)).sum(-1)


@pytest.mark.parametrize("rows", [1, 8, 10_000])
def test_crops_in_chunks_equal_the_plain_formula_in_values_and_gradients(rows: int) -> None:
    unit, matrix, targets = factors()
    each = torch.full((B,), 1 / (B * (2 + 2 * L)), dtype=torch.float64)
    terms, watched = prototype_cross_entropy(unit, matrix, targets, multi_crop_pairings(L), each, rows=rows, watch=True)
    slopes = torch.autograd.grad(terms @ torch.tensor([2.0, 3.0], dtype=torch.float64), (unit, matrix))

    wanted = plain_targets(targets)
    logits = unit @ matrix.T
    local = plain_cross_entropy(logits[2:], wanted.sum(0)).mean(1).sum() / (2 + 2 * L)
    glob = plain_cross_entropy(logits[:2], wanted.flip(0)).mean(1).sum() / (2 + 2 * L)
    torch.testing.assert_close(terms, torch.stack([local, glob]), rtol=1e-12, atol=0)
    for found, expected in zip(slopes, torch.autograd.grad(2 * local + 3 * glob, (unit, matrix)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)

    assert watched is not None
    torch.testing.assert_close(watched.entropy, -torch.xlogy(wanted, wanted).sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(watched.target_sum, wanted.sum((0, 1)), rtol=1e-10, atol=0)
    assert float(watched.top1_agreements) == float((logits[:2].argmax(-1) == wanted.flip(0).argmax(-1)).sum())


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_patches_in_chunks_equal_the_plain_formula_in_values_and_gradients(rows: int) -> None:
    unit, matrix, targets = factors()
    one = Targets(targets.unit[:1], targets.matrix, targets.potential, targets.temperature)
    weight = random(B, seed=9).abs()
    (term,), nothing = prototype_cross_entropy(unit[:1], matrix, one, SAME_VIEW, weight / 4, rows=rows)
    expected = (plain_cross_entropy(unit[0] @ matrix.T, plain_targets(one)[0]) * weight).sum() / 4
    torch.testing.assert_close(term, expected, rtol=1e-12, atol=0)
    for found, other in zip(*(torch.autograd.grad(x, (unit, matrix)) for x in (term, expected)), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-13)
    assert nothing is None


def test_it_is_the_multi_crop_loss_and_the_patch_loss_of_the_vectors() -> None:
    i = torch.arange(12, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    students = torch.cat([(0.3 * torch.cos(i)).reshape(2, 2, 3), (0.3 * torch.sin(1.7 * i)).reshape(2, 2, 3)])
    targets = Targets((0.3 * torch.sin(i)).reshape(2, 2, 3), eye, torch.zeros(3, dtype=torch.float64), 0.07)
    each = torch.full((2,), 1 / 12, dtype=torch.float64)
    terms, _ = prototype_cross_entropy(students, eye, targets, multi_crop_pairings(2), each)
    assert terms.tolist() == pytest.approx([1.626660361, 1.102832260], abs=1e-8)
    assert terms.tolist() == pytest.approx([float(x) for x in multi_crop(students[:2], students[2:], plain_targets(targets))])

    student = torch.tensor([[0.1, 0, 0], [0, 0.1, 0], [0.1, 0, 0]], dtype=torch.float64)
    hidden = Targets(torch.diag(torch.tensor([1.0, 2, 3], dtype=torch.float64))[None], eye, torch.zeros(3), 0.5)
    weight = torch.tensor([0.5, 0.5, 1.0])
    (patch,), _ = prototype_cross_entropy(student[None], eye, hidden, SAME_VIEW, weight / 4)
    assert float(patch) == pytest.approx(0.556149576, abs=1e-8)
    assert float(patch) == pytest.approx(float(masked_patches(student, plain_targets(hidden)[0], weight, 4)), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(0, 3), st.integers(1, 40), st.integers(0, 99))
def test_any_chunks_and_any_order_of_samples_give_the_same_loss(samples: int, local: int, rows: int, seed: int) -> None:
    targets = Targets(random(2, samples, 4, seed=seed), random(K, 4, seed=1), random(K, seed=2), 0.1)
    unit, matrix = random(2 + local, samples, D, seed=seed + 1), random(K, D, seed=3)
    each = random(samples, seed=seed + 2).abs()
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    shuffled = Targets(targets.unit[:, order], targets.matrix, targets.potential, targets.temperature)
    pairings = multi_crop_pairings(local)
    terms, _ = prototype_cross_entropy(unit, matrix, targets, pairings, each)
    others, _ = prototype_cross_entropy(unit[:, order], matrix, shuffled, pairings, each[order], rows=rows)
    torch.testing.assert_close(terms, others, rtol=1e-10, atol=1e-12)


def test_equal_uniform_logits_cost_ln_k_and_do_not_slope() -> None:
    unit, matrix, _ = factors()
    flat = Targets(torch.zeros(2, B, 4), torch.zeros(K, 4), torch.zeros(K), 0.1)
    zero = torch.zeros_like(matrix, requires_grad=True)
    each = torch.full((B,), 1 / (B * (2 + 2 * L)), dtype=torch.float64)
    terms, watched = prototype_cross_entropy(unit, zero, flat, multi_crop_pairings(L), each, watch=True)
    terms.sum().backward()
    assert float(terms.sum()) == pytest.approx(math.log(K), abs=1e-6)
    assert unit.grad is not None and float(unit.grad.abs().max()) == 0.0
    assert watched is not None and float(watched.entropy) == pytest.approx(2 * B * math.log(K), rel=1e-6)


def test_coefficients_of_all_pairs_sum_to_one() -> None:
    for local in (0, 1, 8):
        pairings = multi_crop_pairings(local)
        assert sum(sum(p.targets) * (p.views[1] - p.views[0]) for p in pairings) == 2 + 2 * local


def test_no_rows_at_all_give_zeros_with_a_graph() -> None:
    unit, matrix = torch.zeros(1, 0, D, requires_grad=True), torch.randn(K, D, requires_grad=True)
    nothing = Targets(torch.zeros(1, 0, 4), torch.randn(K, 4), torch.full((K,), torch.inf), 0.1)
    (term,), _ = prototype_cross_entropy(unit, matrix, nothing, SAME_VIEW, torch.zeros(0))
    term.backward()
    assert float(term.detach()) == 0.0
    assert matrix.grad is not None and not matrix.grad.any()


def test_bf16_features_are_multiplied_in_bf16_and_compared_in_fp32() -> None:
    unit, matrix, targets = factors()
    low = unit.detach().bfloat16().requires_grad_()
    wide = matrix.detach().float().requires_grad_()
    rounded = Targets(targets.unit.bfloat16(), targets.matrix.bfloat16(), targets.potential.float(), targets.temperature)
    each = torch.full((B,), 1 / (B * (2 + 2 * L)))
    with torch.autocast("cpu", torch.bfloat16):
        terms, _ = prototype_cross_entropy(low, wide, rounded, multi_crop_pairings(L), each)
    logits = (low @ wide.bfloat16().T).float()
    wanted = torch.softmax((rounded.unit @ rounded.matrix.T).float() / rounded.temperature + rounded.potential, -1)
    expected = torch.stack(multi_crop(logits[:2], logits[2:], wanted))
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)
    assert terms.dtype == torch.float32
    found = torch.autograd.grad(terms.sum(), (low, wide))
    other = torch.autograd.grad(expected.sum(), (low, wide))
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32]
    for one, two in zip(found, other, strict=True):
        assert float((one - two).float().norm() / two.float().norm()) < 0.01


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_nothing_as_large_as_rows_times_prototypes_is_ever_made() -> None:
    n, k, d, rows = 600, 500, 4, 24
    unit, matrix = random(1, n, d).float().requires_grad_(), random(k, d).float().requires_grad_()
    teacher, prototypes = random(n, d, seed=3).float(), random(k, d, seed=4).float()
    kept: list[int] = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        potential = potential_over_chunks(logit_chunks([teacher], prototypes, 0.05, rows), torch.zeros(k))
        targets = Targets(teacher[None], prototypes, potential, 0.05)
        (term,), _ = prototype_cross_entropy(unit, matrix, targets, SAME_VIEW, torch.ones(n) / n, rows=rows, watch=True)
        term.backward()
    assert largest.numbers <= rows * k
    assert sum(kept) <= n * d + k * d
    whole = sinkhorn_potential(teacher @ prototypes.T, 0.05)
    torch.testing.assert_close(potential, whole, rtol=1e-5, atol=1e-4)


def test_logits_that_fit_are_made_once_and_others_anew() -> None:
    units, matrix = [random(3, D), random(4, D, seed=1)], random(K, D, seed=2)
    whole = torch.cat(units) @ matrix.T / 0.1
    for rows, once in ((7, True), (6, False)):
        chunks = logit_chunks(units, matrix, 0.1, rows)
        first, second = list(chunks()), list(chunks())
        torch.testing.assert_close(torch.cat(first), whole)
        torch.testing.assert_close(torch.cat(second), whole)
        assert all(a is b for a, b in zip(first, second, strict=True)) == once
        assert max(map(len, first)) <= rows


@pytest.mark.parametrize("cut", [(4,), (1, 3), (2, 0, 2), (1, 1, 1, 1)])
def test_sinkhorn_over_chunks_is_that_of_the_whole_batch(cut: tuple[int, ...]) -> None:
    parts = torch.split(X.double() / 0.07, cut)
    potential = potential_over_chunks(lambda: parts, torch.zeros(3, dtype=torch.float64))
    expected = torch.tensor([-0.943630, -0.452209, 1.395839], dtype=torch.float64)
    torch.testing.assert_close(potential - potential.mean(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.softmax(X.double() / 0.07 + potential, -1), WARM.double(), atol=1e-6, rtol=0)


def test_chunks_of_other_heights_change_nothing_even_where_exponentials_overflow() -> None:
    logits = torch.tensor([[3.6, 0.0], [0.0, 0.0]], dtype=torch.float64) / 0.04
    potential = potential_over_chunks(lambda: logits.split(1), torch.zeros(2, dtype=torch.float64))
    expected = torch.tensor([[0.857143, 0.142857], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.softmax(logits + potential, -1), expected, atol=1e-6, rtol=0)


def test_a_view_may_meet_several_targets_unequally() -> None:
    unit, matrix, targets = factors()
    weight = torch.ones(B, dtype=torch.float64)
    terms, _ = prototype_cross_entropy(unit, matrix, targets, (Pairing((0, 2), (0.5, 2.0), 1),), weight)
    mixed = 0.5 * plain_targets(targets)[0] + 2.0 * plain_targets(targets)[1]
    expected = plain_cross_entropy(unit[:2] @ matrix.T, mixed).sum()
    torch.testing.assert_close(terms, torch.stack([torch.zeros_like(expected), expected]), rtol=1e-12, atol=0)


def test_kernels_are_chosen_by_the_variable_then_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOVEA_KERNELS", raising=False)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("pipeline.losses.prototypes.find_spec", lambda name: name)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (kernels_for(cpu), kernels_for(cuda)) == ("torch", "triton")
    monkeypatch.setattr("pipeline.losses.prototypes.which", lambda name: None)
    assert kernels_for(cuda) == "triton"
    monkeypatch.delenv("CC")
    assert kernels_for(cuda) == "torch"
    monkeypatch.setattr("pipeline.losses.prototypes.which", lambda name: name)
    assert kernels_for(cuda) == "triton"
    monkeypatch.setattr("pipeline.losses.prototypes.find_spec", lambda name: None)
    assert kernels_for(cuda) == "torch"
    for name in ("torch", "triton"):
        monkeypatch.setenv("FOVEA_KERNELS", name)
        assert kernels_for(cpu) == kernels_for(cuda) == name
    monkeypatch.setenv("FOVEA_KERNELS", "cuda")
    with pytest.raises(ValueError, match="must be one of torch, triton"):
        kernels_for(cpu)


def test_chunks_hold_a_fixed_number_of_logits() -> None:
    assert [rows_per_chunk(prototypes) for prototypes in (2**20, 2**25, 2**30, 3)] == [32, 1, 1, 2**25 // 3]
    for dtype, kernels, rows in ((torch.float32, "torch", 32), (torch.bfloat16, "triton", 128), (torch.float32, "triton", 64)):
        with FakeTensorMode():
            unit, matrix = torch.empty(300, 2, dtype=dtype), torch.empty(2**20, 2)
            chunks = logit_chunks([unit], matrix, 1.0, kernels=kernels)()  # type: ignore[arg-type]
            lengths = [len(chunk.logits if isinstance(chunk, Products) else chunk) for chunk in chunks]
        assert lengths[0] == rows and sum(lengths) == 300


def test_statistics_and_gradients_are_made_only_where_they_are_wanted() -> None:
    unit, matrix, targets = factors()
    weight = torch.ones(B, dtype=torch.float64)
    whole = prototype_cross_entropy(unit, matrix, targets, multi_crop_pairings(L), weight)[0].sum()
    of_unit, of_matrix = torch.autograd.grad(whole, (unit, matrix))
    for inputs, expected in (((unit, matrix.detach()), of_unit), ((unit.detach(), matrix), of_matrix)):
        loss = prototype_cross_entropy(*inputs, targets, multi_crop_pairings(L), weight)[0].sum()
        torch.testing.assert_close(torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])[0], expected)
    terms, watched = prototype_cross_entropy(unit.detach(), matrix.detach(), targets, multi_crop_pairings(L), weight, watch=True)
    assert not terms.requires_grad and watched is not None
    torch.testing.assert_close(terms.sum(), whole.detach())
    # Local crops have two targets, so that none is the one with which the student agrees.
    alone = prototype_cross_entropy(unit[:2], matrix, targets, multi_crop_pairings(0), weight, watch=True)[1]
    assert alone is not None and torch.equal(alone.top1_agreements, watched.top1_agreements)
