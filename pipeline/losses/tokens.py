"""Memory-efficient next-token cross-entropy over a vocabulary, in chunks, without materializing all logits.

As in :mod:`pipeline.losses.prototypes`, gradients are computed in the forward pass, a chunk of rows at a time: no ``[tokens,
vocabulary]`` tensor outlives its chunk, and nothing is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_cross_entropy(hidden: Tensor, vocabulary: Tensor, targets: Tensor, *, rows: int = 1024) -> Tensor:
    """Sum over rows of ``-log softmax(hidden @ vocabulary.T)[target]``, fp32 (fp64 if the states are).

    A sum, not a mean: captions have different lengths, so the mean over all tokens of the batch is not the mean of the ranks'
    means. The caller divides by the number of all ranks' tokens.

    Args:
        hidden: ``[n, d]``, the hidden states that predict the next token; ``n`` may be 0.
        vocabulary: ``[V, d]``.
        targets: int64 ``[n]``.
        rows: rows of logits in memory at once.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _TokenCrossEntropy.apply(hidden, vocabulary, targets, rows)
    return total


@torch.no_grad()
def mean_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean over ranks; without a process group, of this process alone."""
    x = x.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, group=group)
        x /= dist.get_world_size(group)
    return x


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, vocabulary: Tensor, targets: Tensor, rows: int) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        matrix = vocabulary.to(hidden.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        needs_gradient = any(ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if needs_gradient else None
        d_vocabulary = torch.zeros_like(vocabulary, dtype=wide) if needs_gradient else None
        for low in range(0, len(hidden), rows):
            part, target = hidden[low : low + rows], targets[low : low + rows, None]
            log_p = F.log_softmax((part @ matrix.T).to(wide), dim=1)
            total -= log_p.gather(1, target).sum()
            if d_hidden is not None and d_vocabulary is not None:
                gradient = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=wide)).to(hidden.dtype)
                d_hidden[low : low + rows] = gradient @ matrix
                d_vocabulary += gradient.T @ part
        if needs_gradient:
            ctx.save_for_backward(d_hidden, d_vocabulary)
            ctx.kind = vocabulary.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_vocabulary = ctx.saved_tensors
        return d_hidden * upstream, (d_vocabulary * upstream).to(ctx.kind), None, None
