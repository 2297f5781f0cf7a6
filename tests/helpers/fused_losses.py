"""What a process of its own does for test_prototypes_triton.py: once imported, Triton interprets, or compiles, for good."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.losses import (
    SAME_VIEW,
    Pairing,
    Targets,
    logit_chunks,
    multi_crop_pairings,
    potential_over_chunks,
    prototype_cross_entropy,
)

BOTH = (Pairing((0, 2), (0.5, 0.5), 1),)


@dataclass(frozen=True)
class Case:
    """Random factors of logits that are to meet, a block and a bit of prototypes wide in the interpreter."""

    pairings: tuple[Pairing, ...]
    views: int = 2
    targets: int = 2
    n: int = 3
    prototypes: int = 75
    rows: int = 4
    student: torch.dtype = torch.float32
    teacher: torch.dtype = torch.float32

    def factors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Targets, Tensor]:
        """Features and prototypes of the student, targets, and weights of rows."""

        def draw(*shape: int, seed: int) -> Tensor:
            return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)

        unit = torch.nn.functional.normalize(draw(self.views, self.n, 5, seed=1), dim=-1).to(self.student)
        taught = torch.nn.functional.normalize(draw(self.targets, self.n, 4, seed=2), dim=-1).to(self.teacher)
        matrix, teacher = (torch.nn.functional.normalize(draw(self.prototypes, d, seed=d), dim=-1) for d in (5, 4))
        targets = Targets(taught, teacher, draw(self.prototypes, seed=3), 0.06)
        return unit.requires_grad_(), matrix.requires_grad_(), targets, draw(self.n, seed=6).abs() / max(self.n, 1)

    def found(self, kernels: Any, factors: tuple[Tensor, Tensor, Targets, Tensor], temperature: float = 0.1) -> list[Tensor]:
        """Terms, both gradients, and what is watched."""
        unit, matrix, targets, weight = factors
        terms, watched = prototype_cross_entropy(
            unit, matrix, targets, self.pairings, weight, temperature, rows=self.rows, watch=True, kernels=kernels
        )
        slopes = torch.autograd.grad(
            terms @ torch.arange(2.0, 2.0 + len(terms), dtype=terms.dtype, device=terms.device), (unit, matrix)
        )
        return [x.detach() for x in (terms, *slopes, *(watched or ()))]


_low = torch.bfloat16
CASES = {
    "two crops": Case(multi_crop_pairings(0)),
    "two crops and two local ones": Case(multi_crop_pairings(2), views=4),
    "patches": Case(SAME_VIEW, views=1, targets=1, n=5, rows=4),
    "both of DetailCLIP": Case(BOTH),
    "narrower than a block": Case(SAME_VIEW, views=1, targets=1, n=3, prototypes=19),
    "no rows": Case(multi_crop_pairings(2), views=4, n=0),
    "two crops and two local ones, bf16": Case(multi_crop_pairings(2), views=4, student=_low, teacher=_low),
    "patches, bf16": Case(SAME_VIEW, views=1, targets=1, n=5, rows=4, student=_low, teacher=_low),
    "both of DetailCLIP, teacher bf16": Case(BOTH, teacher=_low),
}


def potential(kernels: Any, dtype: torch.dtype, device: str = "cpu", prototypes: int = 75) -> Tensor:
    """Sinkhorn's, of features that came in three parts, one of them empty."""
    parts = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)).to(device, dtype) for n in (11, 0, 3)]
    matrix = torch.randn(prototypes, 4, generator=torch.Generator().manual_seed(1)).to(device)
    chunks = logit_chunks(parts, matrix, 0.1, 9, kernels=kernels)
    return potential_over_chunks(chunks, torch.zeros(prototypes, device=device))


class Wide(TorchFunctionMode):
    """The most numbers in fp32 that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.numbers = max(self.numbers, tensor.numel())
        return out


def interpret(path: str) -> None:
    """Every case through the interpreted kernels, with blocks as small as the cases."""
    from pipeline.losses import prototypes_triton

    prototypes_triton.BLOCK, prototypes_triton.TILE_ROWS, prototypes_triton.TILE_COLUMNS = 64, 4, 64
    found: dict[str, Any] = {name: case.found("triton", case.factors()) for name, case in CASES.items()}
    for kind in (torch.float32, _low):
        found[f"potential, {kind}"] = potential("triton", kind)
    with Wide() as wide:
        case = Case(SAME_VIEW, views=1, targets=1, n=6, rows=6, prototypes=50, student=_low, teacher=_low)
        case.found("triton", case.factors())
        potential("triton", _low, prototypes=50)
    logits = torch.randn(1, 3, 50).bfloat16()
    chunk = prototypes_triton.FusedTargets(torch.randn(1, 3, 50), torch.zeros(50), 0.1)
    _, _, slope = chunk.cross_entropy(logits, (1.0,), torch.ones(3), 0.1, needs_gradient=True, watch=False)
    found |= {"fp32 numbers": wide.numbers, "in place": slope is logits}
    torch.save(found, path)


class Compiler:
    """Stands where Triton expects a GPU's driver, and names the GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def compile_ahead(path: str) -> None:
    """Each launch is compiled for GPUs that are not here, with the arguments that it was made with, instead of run."""
    import triton
    from triton.runtime.jit import JITFunction

    from pipeline.losses.prototypes_triton import FusedTargets, take_in

    made: list[tuple[int, str, bytes]] = []

    def launch(self: Any, grid: Any) -> Callable[..., None]:
        def keep(*args: Any, **kwargs: Any) -> None:
            kernel = self.warmup(*args, grid=grid, **kwargs)
            made.append((capability, self.__name__, kernel.asm["cubin"]))

        return keep

    JITFunction.__getitem__ = launch
    for capability in (80, 90):
        triton.runtime.driver.set_active(Compiler(capability))
        chunk = FusedTargets(torch.zeros(2, 1, 65536, dtype=_low), torch.zeros(65536), 0.05, watch=True)
        for target_weights, watch, dtype, views in (((0.0, 1.0), True, _low, 1), ((1.0, 1.0), False, torch.float32, 8)):
            logits = torch.zeros(views, 1, 65536, dtype=dtype)
            chunk.cross_entropy(logits, target_weights, torch.ones(1), 0.1, needs_gradient=True, watch=watch)
        for shift in (None, torch.zeros(65536)):
            take_in(torch.zeros(2, 65536, dtype=_low), 0.05, shift, torch.zeros(65536), torch.zeros(65536))
    torch.save(made, path)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"1": interpret}.get(os.environ.get("TRITON_INTERPRET", ""), compile_ahead)(sys.argv[1])
