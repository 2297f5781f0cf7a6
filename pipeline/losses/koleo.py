"""KoLeo: spreads features evenly by pushing each one from its nearest neighbour (arXiv 1806.03198; DINOv2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def koleo(x: Tensor, eps: float = 1e-8) -> Tensor:
    """``-mean log(distance to the nearest neighbour)`` of L2-normalised features, fp32.

    Always computed in fp32: in fp16 ``eps`` is 0, and two equal features would give infinity.

    Args:
        x: ``[n, width]``, features of one crop of the images of one rank.
        eps: keeps distances and logarithms finite.

    Returns:
        Scalar. Gradient flows to both ends of each pair. Fewer than two features give 0.
    """
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x.float(), dim=-1, eps=eps)
        if len(unit) < 2:
            return unit.sum() * 0.0
        with torch.no_grad():
            similarity = unit @ unit.T
            nearest = similarity.fill_diagonal_(-1.0).argmax(1)
        distance = torch.linalg.vector_norm(unit - unit[nearest] + eps, dim=1)
        return -torch.log(distance + eps).mean()
