"""Memory-efficient cross-entropy over prototypes (DINO, iBOT), in chunks, without materializing all logits.

DINO and iBOT compare a student with a teacher over K prototypes, up to 262144, for every class token and every masked patch.
The logits of one batch would fill gigabytes, several times over. But logits are ``unit vectors x prototypes``, and unit
vectors are small, so only those are kept. For each chunk of rows the forward pass computes the logits of teacher and student,
the cross-entropy and its gradient with respect to both of the student's factors, and frees the chunk. The backward pass only
scales these gradients: nothing is recomputed, and no ``[tokens, K]`` tensor outlives its chunk.

Two implementations of the elementwise part agree up to rounding. ``triton`` reads the logits as the matrix product left them
and overwrites them with gradients; it is the default for CUDA tensors if Triton is installed. ``torch`` works on fp32 copies;
it is used for all other tensors, and always for fp64. The environment variable ``FOVEA_KERNELS`` (``torch`` or ``triton``)
overrides the choice for the process: where Triton fails (it needs a C compiler), set ``FOVEA_KERNELS=torch``.

The plain formulas, on all logits at once, are in :mod:`pipeline.losses.distill`; tests compare both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**25  # default number of logits in memory at once: 128 MiB in fp32
Kernels = Literal["torch", "triton"]


def rows_per_chunk(prototypes: int) -> int:
    """Rows of logits that make up :data:`CHUNK_LOGITS`."""
    return max(CHUNK_LOGITS // prototypes, 1)


@dataclass(frozen=True)
class Targets:
    """A teacher's targets in factored form: ``softmax(unit @ matrix.T / temperature + potential)``.

    Attributes:
        unit: ``[views, n, width]``, the teacher's features before its prototypes.
        matrix: ``[K, width]``, the teacher's prototypes.
        potential: ``[K]`` fp32: Sinkhorn's (:func:`pipeline.losses.sinkhorn_potential`), or the negative centre divided by the
            temperature.
        temperature: the teacher's temperature.
    """

    unit: Tensor
    matrix: Tensor
    potential: Tensor
    temperature: float


class Products(NamedTuple):
    """Unscaled logits, for kernels that scale them while reading.

    Attributes:
        logits: ``[any, K]``, in the features' dtype.
        temperature: divisor still to be applied.
    """

    logits: Tensor
    temperature: float


class Pairing(NamedTuple):
    """Which student views are compared with which target views.

    Attributes:
        views: range of the student's views, first and one past the last.
        targets: weight of each target view.
        term: index of the loss term that this pairing belongs to.
    """

    views: tuple[int, int]
    targets: tuple[float, ...]
    term: int


class TargetStatistics(NamedTuple):
    """Health statistics of targets and student, summed over the rows of a batch; without gradient.

    Attributes:
        entropy: scalar, entropy of the targets in nats, summed over target views and rows.
        target_sum: ``[K]``, the sum of all targets.
        top1_agreements: scalar, number of rows in which student and target (if there is exactly one) have the same top-1
            prototype.
    """

    entropy: Tensor
    target_sum: Tensor
    top1_agreements: Tensor


def multi_crop_pairings(local: int) -> tuple[Pairing, ...]:
    """DINO's pairings: each global crop against the other's target, ``local`` crops against both. Terms: local 0, global 1."""
    swapped = (Pairing((0, 1), (0.0, 1.0), 1), Pairing((1, 2), (1.0, 0.0), 1))
    return (*swapped, Pairing((2, 2 + local), (1.0, 1.0), 0)) if local else swapped


SAME_VIEW = (Pairing((0, 1), (1.0,), 0),)
"""iBOT's pairing: each patch against the target of the same patch of the same crop."""


def prototype_cross_entropy(
    unit: Tensor,
    matrix: Tensor,
    targets: Targets,
    pairings: Sequence[Pairing],
    weight: Tensor,
    temperature: float = 0.1,
    *,
    rows: int | None = None,
    watch: bool = False,
    kernels: Kernels | None = None,
) -> tuple[Tensor, TargetStatistics | None]:
    """Weighted sums of ``-sum_k target * log_softmax(unit @ matrix.T / temperature)``, one per term.

    Args:
        unit: ``[views, n, width]``, the student's features before its prototypes; products are computed in their dtype.
        matrix: ``[K, width]``, the student's prototypes; its gradient is accumulated in fp32.
        targets: targets of the same ``n`` samples; ``n`` may be 0 and may differ between ranks.
        pairings: which views are compared.
        weight: ``[n]``, weight of each row.
        temperature: the student's temperature.
        rows: rows of logits in memory at once; ``None`` uses :func:`rows_per_chunk`, and more where they need less memory.
        watch: whether to compute health statistics too.
        kernels: implementation; ``None`` uses :func:`kernels_for`.

    Returns:
        Terms ``[1 + the largest term]`` in fp32 (fp64 if the features are), and the health statistics or ``None``.

    Raises:
        ValueError: ``FOVEA_KERNELS`` has an unknown value.
    """
    kernels = "torch" if torch.float64 in (unit.dtype, targets.unit.dtype) else kernels or kernels_for(unit.device)
    rows = rows or _rows(unit, matrix, kernels)
    with torch.autocast(unit.device.type, enabled=False):
        terms, entropy, target_sum, top1_agreements = _PrototypeCrossEntropy.apply(
            unit, matrix, targets, tuple(pairings), weight, temperature, rows, watch, kernels
        )
    return terms, TargetStatistics(entropy, target_sum, top1_agreements) if watch else None


@torch.compiler.assume_constant_result
def kernels_for(device: torch.device) -> Kernels:
    """Kernels by ``FOVEA_KERNELS``; by default ``triton`` on a CUDA device where Triton and the C compiler that it needs are
    installed, else ``torch``.

    Raises:
        ValueError: ``FOVEA_KERNELS`` has another value.
    """
    kernels = os.environ.get("FOVEA_KERNELS")
    for known in get_args(Kernels):
        if kernels == known:
            return known
    if kernels:
        raise ValueError(f"FOVEA_KERNELS={kernels!r} must be one of {', '.join(get_args(Kernels))}")
    compiler = os.environ.get("CC") or next(filter(which, ("gcc", "clang")), None)
    return "triton" if device.type == "cuda" and find_spec("triton") and compiler else "torch"


def scaled_logits(unit: Tensor, matrix: Tensor, temperature: float) -> Tensor:
    """``unit @ matrix.T / temperature``: the product in the features' dtype, then fp32 (fp64 if the features are)."""
    return (unit @ matrix.to(unit.dtype).T).to(_wide(unit)).div_(temperature)


def logit_chunks(
    units: Sequence[Tensor], matrix: Tensor, temperature: float, rows: int | None = None, *, kernels: Kernels | None = None
) -> Callable[[], Iterable[Tensor | Products]]:
    """Returns a function that yields the logits of a batch's features in chunks, repeatedly; callers may overwrite the chunks
    (:func:`pipeline.losses.potential_over_chunks`).

    Args:
        units: parts of the batch, each ``[any, width]``.
        matrix: ``[K, width]``.
        temperature: divides the logits.
        rows: maximum rows in memory at once; ``None`` uses :func:`rows_per_chunk`, and more where they need less memory. Logits
            are computed once if all fit, else again at each call.
        kernels: ``torch`` yields fp32 logits divided by the temperature, ``triton`` yields :class:`Products`; ``None`` uses
            :func:`kernels_for`.
    """
    example = units[0] if units else matrix
    kernels = "torch" if example.dtype == torch.float64 else kernels or kernels_for(matrix.device)
    rows = rows or _rows(example, matrix, kernels)
    if sum(map(len, units)) <= rows:
        kept = tuple(_chunks(units, matrix, temperature, rows, kernels))
        return lambda: kept
    return partial(_chunks, units, matrix, temperature, rows, kernels)


def _chunks(
    units: Sequence[Tensor], matrix: Tensor, temperature: float, rows: int, kernels: Kernels
) -> Iterator[Tensor | Products]:
    with torch.autocast(matrix.device.type, enabled=False):
        for unit in units:
            prototypes = matrix.to(unit.dtype)
            for chunk in unit.split(rows):
                if kernels == "triton":
                    yield Products(chunk @ prototypes.T, temperature)
                else:
                    yield scaled_logits(chunk, prototypes, temperature)


def _rows(unit: Tensor, matrix: Tensor, kernels: Kernels) -> int:
    """Rows per chunk: student and teacher together take 4 bytes an element in bf16, 8 in fp32; torch's copies 16 or more."""
    return rows_per_chunk(len(matrix)) * (8 // unit.element_size() if kernels == "triton" else 1)


def _kernels(name: Kernels) -> Callable[..., _ChunkTargets]:
    if name == "torch":
        return _PlainTargets
    from pipeline.losses.prototypes_triton import FusedTargets

    return FusedTargets


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _ChunkTargets(Protocol):
    # The targets of a chunk of rows and, if watched, their entropy and sum.
    entropy: Tensor | None
    target_sum: Tensor | None

    def cross_entropy(
        self,
        logits: Tensor,
        target_weights: tuple[float, ...],
        weight: Tensor,
        temperature: float,
        *,
        needs_gradient: bool,
        watch: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # Returns the weighted loss of logits [views, rows, K], which may be overwritten; the number of rows whose top-1 agrees;
        # the gradient in the logits' dtype.
        ...


class _PlainTargets:
    def __init__(self, logits: Tensor, potential: Tensor, temperature: float, *, watch: bool) -> None:
        teacher_logits = logits.to(_wide(logits)).div_(temperature).add_(potential)
        self.targets = teacher_logits.softmax(-1)
        self.entropy = teacher_logits.logsumexp(-1).sum() - (self.targets * teacher_logits).sum() if watch else None
        self.target_sum = self.targets.sum((0, 1)) if watch else None

    def cross_entropy(
        self,
        logits: Tensor,
        target_weights: tuple[float, ...],
        weight: Tensor,
        temperature: float,
        *,
        needs_gradient: bool,
        watch: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        target, dtype = _mixture(self.targets, target_weights), logits.dtype
        logits = logits.to(_wide(logits)).div_(temperature)
        top1_agreements = (logits.argmax(-1) == target.argmax(-1)).sum() if watch else None
        log_p = logits.log_softmax(-1)
        del logits  # the caller has dropped its reference, so this frees the memory
        row_losses = -(log_p * target).sum(-1)
        gradient = None
        if needs_gradient:
            # d loss / d logits = weight / temperature * (sum(target) * softmax(logits / temperature) - target), in log_p's memory
            gradient = log_p.exp_() if sum(target_weights) == 1.0 else log_p.exp_().mul_(sum(target_weights))
            gradient = gradient.sub_(target).mul_((weight / temperature).unsqueeze(-1)).to(dtype)
        return (row_losses * weight).sum(), top1_agreements, gradient


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Computes gradients in the forward pass: recomputing the logits later would double the cost."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        matrix: Tensor,
        targets: Targets,
        pairings: tuple[Pairing, ...],
        weight: Tensor,
        temperature: float,
        rows: int,
        watch: bool,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide, needs_gradient = _wide(unit), any(ctx.needs_input_grad[:2])
        count = 1 + max(pairing.term for pairing in pairings)
        weight, prototypes = weight.to(wide), matrix.to(unit.dtype)
        terms, entropy, top1_agreements = (torch.zeros(shape, dtype=wide, device=unit.device) for shape in (count, (), ()))
        target_sum = torch.zeros(len(matrix) if watch else 0, dtype=wide, device=unit.device)
        unit_gradients = torch.zeros_like(unit) if needs_gradient else None
        matrix_gradients = [torch.zeros_like(matrix, dtype=wide) for _ in range(count)] if needs_gradient else []
        max_views = max(max(last - first for (first, last), _, _ in pairings), targets.unit.shape[0])
        step = max(rows // max_views, 1)
        targets_class, teacher_matrix = _kernels(kernels), targets.matrix.to(targets.unit.dtype)
        for start in range(0, unit.shape[1], step):
            part = slice(start, start + step)
            chunk = targets_class(targets.unit[:, part] @ teacher_matrix.T, targets.potential, targets.temperature, watch=watch)
            if chunk.entropy is not None and chunk.target_sum is not None:
                entropy += chunk.entropy
                target_sum += chunk.target_sum
            for (first, last), target_weights, term in pairings:
                student, one_target = unit[first:last, part], sum(target_weights) == 1.0
                # The logits are not kept in a variable: the callee frees or overwrites them.
                loss, agreements, gradient = chunk.cross_entropy(
                    student @ prototypes.T,
                    target_weights,
                    weight[part],
                    temperature,
                    needs_gradient=needs_gradient,
                    watch=watch and one_target,
                )
                terms[term] += loss
                if agreements is not None:
                    top1_agreements += agreements
                if unit_gradients is not None and gradient is not None:
                    unit_gradients[first:last, part] += gradient @ prototypes
                    _add_product(matrix_gradients[term], gradient.flatten(0, 1).T, student.flatten(0, 1))
                del gradient
            del chunk
        if unit_gradients is not None:
            ctx.save_for_backward(unit_gradients, *matrix_gradients)
            ctx.pairings, ctx.dtype = pairings, matrix.dtype
        ctx.mark_non_differentiable(entropy, target_sum, top1_agreements)
        return terms, entropy, target_sum, top1_agreements

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        unit_gradients, *matrix_gradients = ctx.saved_tensors
        unit_gradient = matrix_gradient = None
        if ctx.needs_input_grad[0]:
            unit_gradient = torch.empty_like(unit_gradients)
            for (first, last), _, term in ctx.pairings:
                unit_gradient[first:last] = unit_gradients[first:last] * upstream[term]
        if ctx.needs_input_grad[1]:
            matrix_gradient = matrix_gradients[0] * upstream[0]
            for gradient, factor in zip(matrix_gradients[1:], upstream[1:], strict=True):
                matrix_gradient.addcmul_(gradient, factor)
            matrix_gradient = matrix_gradient.to(ctx.dtype)
        return unit_gradient, matrix_gradient, *(None,) * 7


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total += a @ b


def _mixture(targets: Tensor, target_weights: tuple[float, ...]) -> Tensor:
    """Weighted sum of the target views, ``[rows, K]``."""
    (first, weight), *others = ((view, weight) for view, weight in enumerate(target_weights) if weight)
    mixed = targets[first] if weight == 1.0 else targets[first] * weight
    for view, weight in others:
        mixed = mixed.add(targets[view], alpha=weight)
    return mixed
