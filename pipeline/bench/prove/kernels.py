"""Compares the fused prototype losses with plain torch in fp64, and measures their time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from pipeline.bench.pairs import measure
from pipeline.bench.prove.stage import Check, Setup, at_most
from pipeline.losses import Targets, multi_crop_pairings, prototype_cross_entropy
from pipeline.losses.prototypes import kernels_for

_APART = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, of terms and gradients


def checks(setup: Setup) -> Iterator[Check]:
    """Terms and both gradients against plain torch in fp64, and times, at two numbers of prototypes."""
    device = torch.device(setup.device)
    kernels = kernels_for(device)
    yield Check("kernels", kernels, "triton" if setup.device == "cuda" else "", setup.device == "cpu" or kernels == "triton")
    sizes = (96, 131) if setup.toy else (65536, 131072)
    rows, width = (8, 16) if setup.toy else (256, 256)
    for prototypes in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            factors = _factors(prototypes, rows, width, device, dtype)
            ours = _results(kernels, factors)
            theirs = _results("torch", [x.double() if x.is_floating_point() else x for x in factors])
            apart = max(float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(ours, theirs, strict=True))
            yield at_most(f"{prototypes} prototypes, {str(dtype)[6:]}: relative difference to fp64", apart, _APART[dtype])
    factors = _factors(sizes[-1], rows, width, device, torch.bfloat16)
    acts: dict[str, Any] = {name: partial(_results, name, factors) for name in dict.fromkeys((kernels, "torch"))}
    seconds = {name: case.best for name, case in measure(acts, rounds=3, device=device).items()}
    shown = ", ".join(f"{name} {1e3 * spent:.2f} ms" for name, spent in seconds.items())
    yield Check(f"{sizes[-1]} prototypes, {rows} rows, 4 views: forward and backward", shown)
    once = 4 * rows * sizes[-1] * 4 / seconds[kernels] / 1e9
    yield Check("the student's fp32 logits over that time, GB/s", f"{once:.3g}")


def _factors(prototypes: int, rows: int, width: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Student features, student prototypes, teacher features, teacher prototypes, potential, weights."""

    def draw(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    student, taught = unit(draw(4, rows, width, seed=1)).to(dtype), unit(draw(2, rows, width, seed=2)).to(dtype)
    matrices = [unit(draw(prototypes, width, seed=seed)) for seed in (3, 4)]
    weight = torch.full((rows,), 1 / rows, device=device)
    return [student, matrices[0], taught, matrices[1], draw(prototypes, seed=5), weight]


def _results(kernels: Any, factors: list[torch.Tensor]) -> list[torch.Tensor]:
    student, matrix, taught, teacher, potential, weight = factors
    student, matrix = student.detach().requires_grad_(), matrix.detach().requires_grad_()
    targets = Targets(taught, teacher, potential, 0.06)
    terms, _ = prototype_cross_entropy(student, matrix, targets, multi_crop_pairings(2), weight, 0.1, kernels=kernels)
    gradients = torch.autograd.grad(terms.sum(), (student, matrix))
    return [terms.detach(), *gradients]
