"""KoLeo regularizer: spreads features evenly by pushing each one from its nearest neighbours (arXiv 1806.03198; DINOv2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def koleo(x: Tensor, eps: float = 1e-8, *, group: int | None = None, neighbours: int = 1) -> Tensor:
    """``-mean log(distance to the nearest neighbours)`` of L2-normalized features, fp32 (fp64 if the features are).

    Always computed in at least fp32: in fp16 ``eps`` is 0, and two equal features would give infinity.

    Args:
        x: ``[n, width]``, features of one crop of some images.
        eps: keeps distances and logarithms finite.
        group: number of consecutive images among which neighbours are searched; ``None`` means all. With groups the mean over
            the parts of a batch does not depend on how it was split, as long as no group was.
        neighbours: number of nearest neighbours that each feature is pushed from.

    Returns:
        Scalar. Gradient flows to both features of each pair. Fewer than two features give 0.

    Raises:
        ValueError: ``n`` is not a multiple of ``group``.
    """
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=eps)
        size = group or max(len(unit), 1)
        if len(unit) % size:
            raise ValueError(f"{len(unit)} features are not divisible into groups of {size}")
        if min(len(unit), size) < 2:
            return unit.sum() * 0.0
        with torch.no_grad():
            grouped = unit.unflatten(0, (-1, size))
            similarity = grouped @ grouped.mT
            similarity.diagonal(dim1=1, dim2=2).fill_(-2.0)
            nearest = similarity.topk(min(neighbours, size - 1), dim=-1).indices
            nearest += torch.arange(0, len(unit), size, device=x.device)[:, None, None]
        distance = torch.linalg.vector_norm(unit.unsqueeze(1) - unit[nearest.flatten(0, 1)] + eps, dim=-1)
        return -torch.log(distance + eps).mean()


def koleo_across_ranks(
    x: Tensor,
    eps: float = 1e-8,
    *,
    group: int | None = None,
    neighbours: int = 1,
    ranks: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`koleo` over all ranks' features, in rank order; the same value on every rank.

    Its gradient is scaled for an engine that averages gradients over ranks.

    Args:
        x: ``[n, width]``, this rank's features; the same number on every rank.
        eps, group, neighbours: as for :func:`koleo`.
        ranks: process group; without one, this process alone.
    """
    if dist.is_available() and dist.is_initialized():
        x = _Gather.apply(x, ranks)
    return koleo(x, eps, group=group, neighbours=neighbours)


class _Gather(torch.autograd.Function):
    """All-gathers rows. Every rank computes the same loss, so the gradient of its own rows needs no communication; it is
    multiplied by the world size, because the engine averages over ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: dist.ProcessGroup | None) -> Tensor:
        ctx.rank, ctx.size, ctx.rows = dist.get_rank(ranks), dist.get_world_size(ranks), len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ctx.size)]
        dist.all_gather(parts, x.contiguous(), group=ranks)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.rank * ctx.rows :][: ctx.rows] * ctx.size, None
