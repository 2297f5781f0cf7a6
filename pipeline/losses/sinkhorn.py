"""Sinkhorn-Knopp targets (SwAV, arXiv 2006.09882; DINOv2, arXiv 2304.07193).

The matrix ``exp(logits / T)`` is scaled alternately so that each prototype gets equal mass over the global batch and each
sample sums to one. The matrix itself never changes: the two scalings are vectors, and an iteration is two matrix-vector
products. Only the prototypes' sums are communicated: K floats, twice per iteration. If logits lie so far apart that their
exponentials would underflow, the same iteration runs in log space.

The K potentials determine the whole result, and they can be computed from the logits chunk by chunk. This makes a batch that
is split over micro-batches and ranks equivalent to one that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.losses.prototypes import Products

_RANGE = 60.0  # range of logits / temperature within which exponentials, sums and quotients fit into fp32


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3, group: dist.ProcessGroup | None = None) -> Tensor:
    """Targets of all samples of the global batch; each rank passes and gets its own.

    Args:
        logits: ``[n, K]``; ``n`` may differ between ranks and may be 0.
        temperature: the teacher's temperature.
        iterations: number of scalings of prototypes and samples each.
        group: ranks that share the batch; ``None`` means all of them. Without a process group, this process alone.

    Returns:
        ``[n, K]`` fp32, rows sum to 1.
    """
    potential = sinkhorn_potential(logits, temperature, iterations, group)
    return torch.softmax(logits.float() / temperature + potential, dim=-1)


def sinkhorn_potential(logits: Tensor, temperature: float, iterations: int = 3, group: dist.ProcessGroup | None = None) -> Tensor:
    """The K potentials that determine the targets: ``targets = softmax(logits / temperature + potential)``.

    Args:
        logits: as for :func:`sinkhorn`.
        temperature: the teacher's temperature.
        iterations: number of scalings of prototypes and samples each.
        group: ranks that share the batch.

    Returns:
        ``[K]`` fp32, equal on all ranks, defined up to a constant.
    """
    scaled = logits.detach().float() / temperature
    return potential_over_chunks(lambda: (scaled,), scaled.new_zeros(scaled.shape[1]), iterations, group)


@torch.no_grad()
def potential_over_chunks(
    chunks: Callable[[], Iterable[Tensor | Products]], zeros: Tensor, iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """:func:`sinkhorn_potential` of logits in chunks, which need not all be in memory.

    Args:
        chunks: returns ``logits / temperature`` at each call, in chunks ``[any, K]`` that may be overwritten. A tuple is
            requested once and reused; any other iterable is requested again in each iteration. Ranks may have different
            numbers of chunks, also none. Triton reads :class:`Products` without a copy.
        zeros: ``[K]``, dtype and device of the result.
        iterations: number of scalings of prototypes and samples each.
        group: ranks that share the batch.

    Returns:
        ``[K]``, equal on all ranks, defined up to a constant.
    """
    with torch.autocast(zeros.device.type, enabled=False):
        return _potential(chunks, zeros, iterations, group)


def _potential(
    chunks: Callable[[], Iterable[Tensor | Products]], zeros: Tensor, iterations: int, group: dist.ProcessGroup | None
) -> Tensor:
    potential, first_chunks = zeros, chunks()
    kept = tuple(map(_exponentiated, first_chunks)) if isinstance(first_chunks, tuple) else None
    for iteration in range(iterations):
        peak, total = torch.full_like(zeros, -torch.inf), torch.zeros_like(zeros)
        for chunk in kept if kept is not None else map(_exponentiated, chunks() if iteration else first_chunks):
            if len(chunk.logits if isinstance(chunk, Products) else chunk[0]):
                peak, total = _taken_in(chunk, potential if iteration else None, peak, total)
        potential = -_across_ranks(peak, total, group)
    return potential


class _Plan(NamedTuple):
    numbers: Tensor  # exp(logits - top)
    top: Tensor


class _Logits(NamedTuple):
    numbers: Tensor


def _exponentiated(chunk: Tensor | Products) -> _Plan | _Logits | Products:
    """Exponentiates a chunk in place, if nothing in it underflows.

    Checked only for CPU tensors: a GPU would have to synchronize, and fake tensors have no values.
    """
    if isinstance(chunk, Products):
        return chunk
    if type(chunk) is not Tensor or chunk.is_cuda or not chunk.numel():
        return _Logits(chunk)
    least, top = chunk.aminmax()
    return _Plan(chunk.sub_(top).exp_(), top) if float(top - least) < _RANGE else _Logits(chunk)


def _taken_in(rows: _Plan | _Logits | Products, potential: Tensor | None, peak: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Adds rows to the columns' sums ``exp(peak) * total``; with a potential the rows are first normalized to sum to one."""
    if isinstance(rows, _Plan):
        if potential is None:
            sums, top = rows.numbers.sum(0), rows.top
        else:
            top = -potential.max()
            scale = (potential + top).exp_().to(rows.numbers.dtype)
            sums = (rows.numbers @ scale).reciprocal_() @ rows.numbers
        higher = torch.maximum(peak, top)
        return higher, total * (peak - higher).exp_() + sums * (top - higher).exp_()
    if isinstance(rows, Products):
        from pipeline.losses.prototypes_triton import take_in

        take_in(rows.logits, rows.temperature, potential, peak, total)
        return peak, total
    chunk = rows.numbers
    if potential is not None:
        chunk = chunk - torch.logsumexp(chunk + potential, dim=1, keepdim=True)
    higher = torch.maximum(peak, chunk.amax(0))
    return higher, total * (peak - higher).exp_() + (chunk - higher).exp_().sum(0)


def _across_ranks(peak: Tensor, total: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Logarithm of the sum of all ranks' ``exp(peak) * total``."""
    together = dist.is_available() and dist.is_initialized()
    highest = peak.clone()
    if together:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    highest = highest.masked_fill(highest.isinf(), 0.0)  # no rank has a row
    total = total * (peak - highest).exp_()
    if together:
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total.log_().add_(highest)
