"""Contrastive image-text losses over the global batch, in chunks of logits: CLIP (softmax, arXiv 2103.00020) and SigLIP (sigmoid,
arXiv 2303.15343).

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
    row_offset = rank_offset(len(images), group)
    zero = torch.zeros_like(scale)
    rows = _Pairs.apply(images, gathered(texts, group), scale, zero, row_offset, chunk, _softmax)
    columns = _Pairs.apply(texts, gathered(images, group), scale, zero, row_offset, chunk, _softmax)
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
    row_offset = rank_offset(len(images), group)
    loss: Tensor = _Pairs.apply(images, gathered(texts, group), scale, bias, row_offset, chunk, _sigmoid)
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
            row_offset = rank_offset(ctx.rows, ctx.group)
            return gradient[row_offset : row_offset + ctx.rows], None
        own_gradient = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own_gradient, gradient, group=ctx.group)
        return own_gradient, None


class _Pairs(torch.autograd.Function):
    """Mean over rows of the loss and gradient that a function computes per chunk of logits ``scale * x @ y.T + bias``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, row_offset: int, chunk: int, evaluate_chunk: _LossAndGradient
    ) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad)
        total, d_scale, d_bias = x.new_zeros(()), torch.zeros_like(scale), torch.zeros_like(bias)
        dx, dy = (torch.empty_like(x), torch.zeros_like(y)) if needs_gradient else (x, y)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), chunk):
                rows = x[start : start + chunk]
                positive_columns = torch.arange(row_offset + start, row_offset + start + len(rows), device=x.device)
                cosines = rows @ y.T
                loss, logit_gradient = evaluate_chunk(cosines * scale + bias, positive_columns)
                total += loss
                if needs_gradient:
                    dx[start : start + chunk] = logit_gradient @ y
                    dy.addmm_(logit_gradient.T, rows)
                    d_scale += torch.vdot(logit_gradient.flatten(), cosines.flatten())
                    d_bias += logit_gradient.sum()
        n = max(len(x), 1)
        if needs_gradient:
            ctx.save_for_backward(dx * (scale / n), dy * (scale / n), d_scale / n, d_bias / n)
        return total / n

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient * part for part in ctx.saved_tensors), None, None, None)


def _softmax(logits: Tensor, positive_columns: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's loss of a chunk: sum of the rows' cross-entropies, and its gradient.

    Args:
        logits: ``[rows, B]``.
        positive_columns: int64 ``[rows]``, the column of each row's pair.

    Returns:
        The loss, scalar; its gradient with respect to the logits, ``[rows, B]``.
    """
    log_p = F.log_softmax(logits, dim=1)
    index = positive_columns[:, None]
    loss = -log_p.gather(1, index).sum()
    logit_gradient = log_p.exp_()  # d loss / d logits = softmax(logits) - one_hot(positive_columns)
    return loss, logit_gradient.scatter_add_(1, index, -torch.ones_like(logit_gradient[:, :1]))


def _sigmoid(logits: Tensor, positive_columns: Tensor) -> tuple[Tensor, Tensor]:
    """SigLIP's loss of a chunk: sum over all pairs of ``-log sigmoid(z * logit)``, and its gradient.

    Args:
        logits: ``[rows, B]``, overwritten.
        positive_columns: int64 ``[rows]``, the column of each row's pair, where ``z`` is 1; elsewhere it is -1.

    Returns:
        The loss, scalar; its gradient with respect to the logits, ``[rows, B]``.
    """
    index = positive_columns[:, None]
    positive = logits.gather(1, index)
    loss = F.softplus(logits.scatter(1, index, -positive)).sum()
    # d loss / d logits = sigmoid(logits) - one_hot(positive_columns)
    return loss, logits.sigmoid_().scatter_add_(1, index, -torch.ones_like(positive))
