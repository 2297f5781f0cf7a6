"""Collapse metrics of features: effective rank and spread."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def effective_rank(x: Tensor) -> Tensor:
    """``(sum of variances)^2 / sum of squared variances`` along the principal directions: 1 for features on a line, the width
    for features with equal variance in all directions. Takes two matrix products, no decomposition and no device
    synchronization.

    Args:
        x: ``[n, width]``; the rank is at most ``n - 1``.

    Returns:
        fp32 scalar; 0 if the features have no variance.
    """
    with torch.autocast(x.device.type, enabled=False):
        centred = x.float() - x.float().mean(0)
        centred = centred / centred.square().mean().sqrt().clamp(min=1e-30)
        gram = centred @ centred.T if len(x) < x.shape[1] else centred.T @ centred
        return gram.trace().square() / gram.square().sum().clamp(min=1e-30)


@torch.no_grad()
def spread(x: Tensor) -> Tensor:
    """``1 - |mean of the unit vectors|^2``: 0 if all features have the same direction, 1 if directions are balanced.

    Complements the scale-free :func:`effective_rank`: it also detects features that share a common direction.

    Args:
        x: ``[n, width]``.

    Returns:
        fp32 scalar.
    """
    return 1 - F.normalize(x.float(), dim=1).mean(0).square().sum()
