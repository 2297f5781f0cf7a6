"""Centred targets (DINO, arXiv 2104.14294): softmax of the teacher's logits minus their running mean."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def centered_targets(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """``softmax((logits - center) / temperature)``, ``[n, K]`` fp32.

    Args:
        logits: ``[n, K]``.
        center: ``[K]``, from earlier batches.
        temperature: the teacher's temperature.
    """
    return torch.softmax((logits.float() - center.float()) / temperature, dim=-1)


@torch.no_grad()
def global_mean(sums: Tensor, count: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean over all rows of all ranks, each row with the same weight however rows are distributed; zeros if there are no rows.

    Args:
        sums: ``[width]``, the sum of this rank's rows.
        count: number of this rank's rows.
        group: ranks that share the batch; without a process group, this process alone.
    """
    both = torch.cat([sums, sums.new_full((1,), count)])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(both, group=group)
    return both[:-1] / both[-1:].clamp(min=1.0)


@torch.no_grad()
def batch_center(logits: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean over ranks of each rank's mean logits, ``[K]`` fp32; as in DINOv2 not weighted by the ranks' numbers of rows.

    Args:
        logits: ``[n, K]``; a rank without rows adds zeros.
        group: ranks that share the batch; without a process group, this process alone.
    """
    mean = logits.float().sum(0) / max(len(logits), 1)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
    return mean


def moved_center(center: Tensor, batch_mean: Tensor, momentum: float = 0.9) -> Tensor:
    """Updated centre, ``momentum * center + (1 - momentum) * batch_mean``."""
    return torch.lerp(center, batch_mean.to(center), 1.0 - momentum)
