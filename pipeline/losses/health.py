"""How far features lie apart, and how many directions they really use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def effective_rank(x: Tensor) -> Tensor:
    """``(sum of variances)^2 / sum of squared variances`` along the principal directions: 1 for features on a line, and the
    width for features that vary alike in all directions. Two matrix products, no decomposition and no wait for the device.

    Args:
        x: ``[n, width]``; no more than ``n - 1`` directions can be found.

    Returns:
        fp32 scalar; 0 if the features do not vary at all.
    """
    with torch.autocast(x.device.type, enabled=False):
        centred = x.float() - x.float().mean(0)
        centred = centred / centred.square().mean().sqrt().clamp(min=1e-30)
        gram = centred @ centred.T if len(x) < x.shape[1] else centred.T @ centred
        return gram.trace().square() / gram.square().sum().clamp(min=1e-30)


@torch.no_grad()
def spread(x: Tensor) -> Tensor:
    """``1 - |mean of the unit vectors|^2``: 0 if all features point one way, 1 if they point anywhere. It tells what
    :func:`effective_rank`, which knows no scale, does not: features that move together and keep their directions.

    Args:
        x: ``[n, width]``.

    Returns:
        fp32 scalar.
    """
    return 1 - F.normalize(x.float(), dim=1).mean(0).square().sum()
