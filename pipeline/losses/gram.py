"""Gram anchoring (DINOv3, arXiv 2508.10104): how alike the patches of a picture are to one another stays as it was."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gram(student: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared difference of the two matrices of cosines between the patches of each picture, fp32.

    Args:
        student: patch tokens ``[batch, patches, width]``.
        anchor: the same patches by a network that stands still, ``[batch, patches, any width]``; no gradient flows to it.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = F.normalize(student.float(), dim=-1), F.normalize(anchor.detach().float(), dim=-1)
        return F.mse_loss(ours @ ours.transpose(1, 2), theirs @ theirs.transpose(1, 2))
