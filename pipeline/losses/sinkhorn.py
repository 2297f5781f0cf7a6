"""Sinkhorn-Knopp targets (SwAV, arXiv 2006.09882; DINOv2, arXiv 2304.07193), in the log domain.

The plan ``exp(logits / T)`` is scaled alternately so that each prototype gets equal mass over the global batch and each
sample sums to one. Only the prototypes' sums cross ranks: K floats, twice an iteration. Nothing is exponentiated before
its maximum is taken off, so no temperature overflows. A maximum per sample would not do: with few iterations the result
depends on it; here potentials are kept instead, which is exact.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3, group: dist.ProcessGroup | None = None) -> Tensor:
    """Targets of all samples of the global batch; each rank passes and gets its own.

    Args:
        logits: ``[n, K]``; ``n`` may differ between ranks and may be 0.
        temperature: the teacher's temperature.
        iterations: scalings of prototypes and samples each.
        group: ranks that share the batch; ``None`` is all of them. Without a process group, this process alone.

    Returns:
        ``[n, K]`` fp32, rows sum to 1.
    """
    potential = sinkhorn_potential(logits, temperature, iterations, group)
    return torch.softmax(logits.float() / temperature + potential, dim=-1)


@torch.no_grad()
def sinkhorn_potential(logits: Tensor, temperature: float, iterations: int = 3, group: dist.ProcessGroup | None = None) -> Tensor:
    """The K numbers that hold the whole plan: ``targets = softmax(logits / temperature + potential)``.

    Args:
        logits: as for :func:`sinkhorn`.
        temperature: the teacher's temperature.
        iterations: scalings of prototypes and samples each.
        group: ranks that share the batch.

    Returns:
        ``[K]`` fp32, equal on all ranks, defined up to a constant.
    """
    scaled = logits.detach().float() / temperature
    sample = scaled.new_zeros(len(scaled), 1)
    potential = scaled.new_zeros(scaled.shape[1])
    for iteration in range(iterations):
        if iteration:
            sample = -torch.logsumexp(scaled + potential, dim=1, keepdim=True)
        potential = -_global_logsumexp(scaled + sample, group)
    return potential


def _global_logsumexp(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    peak = x.amax(0) if len(x) else x.new_full((x.shape[1],), -torch.inf)
    together = dist.is_available() and dist.is_initialized()
    if together:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    peak = peak.masked_fill(peak.isinf(), 0.0)
    total = (x - peak).exp_().sum(0)
    if together:
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total.log_().add_(peak)
