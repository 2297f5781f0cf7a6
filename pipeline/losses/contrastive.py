"""Image-text losses over all pairs of a global batch: CLIP's softmax (arXiv 2103.00020), SigLIP's sigmoid (arXiv 2303.15343).

Each rank contrasts its own ``b`` images and texts with all ``B`` of the other kind. Gradients flow into the gathered features
and are reduced to the rank they came from, so that the mean over ranks of the local losses has the gradient of one process
with the whole batch. Logits are computed ``chunk`` rows at a time together with their gradients, so the memory kept for the
backward pass is only the size of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_LossAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def clip_loss(
    images: Tensor, texts: Tensor, scale: Tensor, *, group: dist.ProcessGroup | None = None, chunk: int = 1024
) -> Tensor:
    """CLIP's loss ``(mean CE(rows) + mean CE(columns)) / 2`` of the logits ``scale * images @ texts.T``, this rank's part.

    Args:
        images: ``[b, d]`` unit vectors; the same number on every rank.
        texts: ``[b, d]`` unit vectors, row ``i`` belongs to image ``i``.
        scale: ``[1]``, the inverse temperature (not its logarithm).
        group: ranks that share the batch; without a process group, this process alone.
        chunk: rows of logits in memory at a time.

    Returns:
        Scalar, fp32 or wider. Its mean over the ranks is the loss of the global batch; ``ln B`` for random features.
    """
    images, texts, scale = _wide(images), _wide(texts), _wide(scale)
    first = rank_offset(len(images), group)
    zero = torch.zeros_like(scale)
    rows = _Pairs.apply(images, gathered(texts, group), scale, zero, first, chunk, _softmax)
    columns = _Pairs.apply(texts, gathered(images, group), scale, zero, first, chunk, _softmax)
    loss: Tensor = (rows + columns) / 2
    return loss


def siglip_loss(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, *, group: dist.ProcessGroup | None = None, chunk: int = 1024
) -> Tensor:
    """SigLIP's loss ``-1/b sum_ij log sigmoid(z_ij (scale * images_i . texts_j + bias))``; ``z`` is 1 for pairs, else -1.

    Args:
        images: ``[b, d]`` unit vectors; the same number on every rank.
        texts: ``[b, d]`` unit vectors, row ``i`` belongs to image ``i``.
        scale: ``[1]``, the inverse temperature.
        bias: ``[1]``, added to every logit.
        group: ranks that share the batch; without a process group, this process alone.
        chunk: rows of logits in memory at a time.

    Returns:
        Scalar, fp32 or wider. Its mean over the ranks is the loss of the global batch.
    """
    images, texts, scale, bias = _wide(images), _wide(texts), _wide(scale), _wide(bias)
    first = rank_offset(len(images), group)
    loss: Tensor = _Pairs.apply(images, gathered(texts, group), scale, bias, first, chunk, _sigmoid)
    return loss


def gathered(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All-gathers ``[b, d]`` to ``[world * b, d]`` in rank order; backward sums all ranks' gradients of this rank's rows."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return x
    all_rows: Tensor = _Gather.apply(x, group)
    return all_rows


def rank_offset(rows: int, group: dist.ProcessGroup | None = None) -> int:
    """Index of this rank's first row in the gathered batch."""
    together = dist.is_available() and dist.is_initialized()
    return rows * dist.get_rank(group) if together else 0


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        if dist.get_backend(ctx.group) == "gloo":
            dist.all_reduce(gradient, group=ctx.group)
            first = rank_offset(ctx.rows, ctx.group)
            return gradient[first : first + ctx.rows], None
        own = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient, group=ctx.group)
        return own, None


class _Pairs(torch.autograd.Function):
    """Mean over rows of the loss and gradient that a function computes per chunk of logits ``scale * x @ y.T + bias``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, first: int, chunk: int, evaluate_chunk: _LossAndGradient
    ) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad)
        total, d_scale, d_bias = x.new_zeros(()), torch.zeros_like(scale), torch.zeros_like(bias)
        dx, dy = (torch.empty_like(x), torch.zeros_like(y)) if needs_gradient else (x, y)
        with torch.autocast(x.device.type, enabled=False):
            for low in range(0, len(x), chunk):
                rows = x[low : low + chunk]
                own = torch.arange(first + low, first + low + len(rows), device=x.device)
                cosines = rows @ y.T
                loss, g = evaluate_chunk(cosines * scale + bias, own)
                total += loss
                if needs_gradient:
                    dx[low : low + chunk] = g @ y
                    dy.addmm_(g.T, rows)
                    d_scale += torch.vdot(g.flatten(), cosines.flatten())
                    d_bias += g.sum()
        n = max(len(x), 1)
        if needs_gradient:
            ctx.save_for_backward(dx * (scale / n), dy * (scale / n), d_scale / n, d_bias / n)
        return total / n

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient * part for part in ctx.saved_tensors), None, None, None)


def _softmax(logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the rows' cross-entropies, and its gradient."""
    log_p = F.log_softmax(logits, dim=1)
    index = own[:, None]
    loss = -log_p.gather(1, index).sum()
    g = log_p.exp_()
    return loss, g.scatter_add_(1, index, -torch.ones_like(g[:, :1]))


def _sigmoid(logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over all pairs of ``-log sigmoid(z * logit)``, and its gradient."""
    index = own[:, None]
    positive = logits.gather(1, index)
    loss = F.softplus(logits.scatter(1, index, -positive)).sum()
    return loss, logits.sigmoid_().scatter_add_(1, index, -torch.ones_like(positive))
