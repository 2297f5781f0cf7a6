"""Gram anchoring (DINOv3, arXiv 2508.10104): patches keep the similarities that an earlier, sharper teacher gave them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference between the cosine similarities of all pairs of patches of the same picture, fp32 (or fp64).

    Args:
        student: ``[batch, patches, width]``.
        teacher: ``[batch, patches, any width]``, of the same patches; no gradient flows into it.

    Returns:
        Scalar.
    """
    with torch.autocast(student.device.type, enabled=False):
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        ours, theirs = (F.normalize(x.to(wide), dim=-1) for x in (student, teacher.detach()))
        return (ours @ ours.mT - theirs @ theirs.mT).square().mean()
