"""The Triton kernels of the prototypes' cross-entropy: what plain torch finds, and code for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.losses import multi_crop_pairings, prototype_cross_entropy, prototypes
from tests.helpers.fused_losses import CASES, Case, potential

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("terms", "slope of the features", "slope of the prototypes", "entropy", "target sum", "top-1 agreements")


def other_process(path: Path, **environment: str) -> Any:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(path.parent), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.fused_losses", str(path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return other_process(tmp_path_factory.mktemp("interpreted") / "found.pt", TRITON_INTERPRET="1")


def in_fp64(case: Case) -> list[Tensor]:
    """The formulas on whole logits; rounded where products are rounded."""
    unit, matrix, targets, weight = case.factors()
    unit, matrix = (x.detach().double().requires_grad_() for x in (unit, matrix))
    taught = targets.unit.double() @ targets.matrix.to(case.teacher).double().T
    wanted = torch.softmax(taught.to(case.teacher).double() / targets.temperature + targets.potential, -1)
    logits = unit @ (matrix + (matrix.to(case.student).double() - matrix).detach()).T
    logits = logits + (logits.to(case.student).double() - logits).detach()
    terms, agreed = torch.zeros(1 + max(p.term for p in case.pairings), dtype=torch.float64), 0.0
    for (first, last), target_weights, term in case.pairings:
        target = torch.einsum("v,vnk->nk", torch.tensor(target_weights, dtype=torch.float64), wanted)
        each = -(target * torch.log_softmax(logits[first:last] / 0.1, -1)).sum(-1)
        terms = terms.index_add(0, torch.tensor(term), (each * weight.double()).sum()[None])
        if sum(target_weights) == 1.0:
            agreed += float((logits[first:last].argmax(-1) == target.argmax(-1)).sum())
    slopes = torch.autograd.grad(terms @ torch.arange(2.0, 2.0 + len(terms), dtype=torch.float64), (unit, matrix))
    entropy = -torch.xlogy(wanted, wanted).sum()
    return [x.detach() for x in (terms, *slopes, entropy, wanted.sum((0, 1)), torch.tensor(agreed))]


def alike(found: Sequence[Tensor], expected: Sequence[Tensor], values: float, slopes: float) -> None:
    """``values`` bounds what is summed in fp32, ``slopes`` what is rounded to the features' type; both of the norm."""
    for name, one, two in zip(NAMES, found, expected, strict=True):
        assert one.shape == two.shape, name
        apart, norm = float((one.double() - two.double()).norm()), float(two.double().norm())
        assert apart <= norm * (slopes if name.startswith("slope") else values), f"{name}: {apart:.1e} of {norm:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_fused_kernels_find_what_plain_torch_and_the_formulas_in_fp64_do(interpreted: dict[str, Any], name: str) -> None:
    case, low = CASES[name], CASES[name].student == torch.bfloat16
    found, plain = interpreted[name], case.found("torch", case.factors())
    assert [x.dtype for x in found] == [x.dtype for x in plain]
    alike(found, plain, 1e-5, 8e-3 if low else 1e-5)  # bf16: the interpreter cuts slopes off where others round
    alike(found, in_fp64(case), 1e-5, 1e-2 if low else 1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_sinkhorn_over_products_is_that_over_their_copies_in_fp32(interpreted: dict[str, Any], kind: torch.dtype) -> None:
    torch.testing.assert_close(interpreted[f"potential, {kind}"], potential("torch", kind), rtol=1e-5, atol=1e-5)


def test_logits_stay_in_their_type_and_slopes_take_their_place(interpreted: dict[str, Any]) -> None:
    assert interpreted["in place"]
    assert interpreted["fp32 numbers"] < 6 * 50, "a chunk of logits was copied to fp32"


@pytest.mark.slow
def test_every_launch_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    made = other_process(tmp_path / "made.pt")
    kernels = ["row_norms", "column_sums", *["cross_entropy_rows"] * 2, "column_norms", "row_norms", "column_norms"]
    assert [(capability, name) for capability, name, _ in made] == [(c, name) for c in (80, 90) for name in kernels]
    assert all(code.startswith(b"\x7fELF") for *_, code in made)
    assert len({code for *_, code in made}) == 2 * 6, "only the rows' norms are found twice by the same code"


def test_triton_is_for_cuda_and_a_word_in_the_environment_overrules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FOVEA_KERNELS", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(prototypes, "which", lambda name: f"/usr/bin/{name}")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (prototypes.kernels_for(cpu), prototypes.kernels_for(cuda)) == ("torch", "triton")
    monkeypatch.setenv("FOVEA_KERNELS", "torch")
    assert prototypes.kernels_for(cuda) == "torch"
    monkeypatch.setenv("FOVEA_KERNELS", "triton")
    assert prototypes.kernels_for(cpu) == "triton"
    monkeypatch.setenv("FOVEA_KERNELS", "tritn")
    with pytest.raises(ValueError, match="FOVEA_KERNELS='tritn'"):
        prototypes.kernels_for(cpu)
    monkeypatch.delenv("FOVEA_KERNELS")
    with monkeypatch.context() as there:
        there.setattr(prototypes, "find_spec", lambda name: None)
        assert prototypes.kernels_for(cuda) == "torch", "Triton is not installed"
    monkeypatch.setattr(prototypes, "which", lambda name: None)
    assert prototypes.kernels_for(cuda) == "torch", "there is no C compiler for its launchers"


def test_fp64_is_never_rounded_to_the_kernels_fp32() -> None:
    unit, matrix, targets, weight = CASES["two crops"].factors()
    wide = [x.detach().double() for x in (unit, matrix, weight)]
    same = replace(targets, unit=targets.unit.double(), matrix=targets.matrix.double(), potential=targets.potential.double())
    arguments = (wide[0], wide[1], same, multi_crop_pairings(0), wide[2])
    fused, plain = (prototype_cross_entropy(*arguments, kernels=kernels)[0] for kernels in ("triton", "torch"))
    assert fused.dtype == torch.float64 and torch.equal(fused, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("prototypes", [65536, 65539])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["two crops and two local ones", "patches", "both of DetailCLIP"])
def test_on_a_gpu_fused_kernels_find_what_plain_torch_does_and_the_same_bits_twice(
    name: str, kind: torch.dtype, prototypes: int
) -> None:
    case = replace(CASES[name], n=37, prototypes=prototypes, rows=30, student=kind, teacher=kind)
    first, again, plain = (case.found(kernels, case.factors("cuda")) for kernels in ("triton", "triton", "torch"))
    alike(first, plain, 1e-5, 2e-3 if kind == torch.bfloat16 else 1e-5)  # a slope on the brink may be rounded the other way
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    fused, plain_potential = (potential(kernels, kind, "cuda", prototypes) for kernels in ("triton", "torch"))
    torch.testing.assert_close(fused, plain_potential, rtol=1e-5, atol=1e-4)
