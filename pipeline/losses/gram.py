"""Gram anchoring (DINOv3, arXiv 2508.10104): keeps the similarities between patch tokens close to an anchor network's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gram(student: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared difference of the Gram matrices (cosines between the patches of each image), fp32.

    Args:
        student: patch tokens ``[batch, patches, width]``.
        anchor: the same patches by a frozen network, ``[batch, patches, any width]``; gets no gradient.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = F.normalize(student.float(), dim=-1), F.normalize(anchor.detach().float(), dim=-1)
        return F.mse_loss(ours @ ours.transpose(1, 2), theirs @ theirs.transpose(1, 2))


def resampled_patches(patches: Tensor, side: int) -> Tensor:
    """Resamples the features of a square patch grid to another size, fp32: bicubic (a = -0.75), without antialiasing.

    An anchor that sees a crop at twice the size has four features per feature of the student (DINOv3's choice of resampling).

    Args:
        patches: ``[batch, n * n, width]``.
        side: rows and columns of the target grid; ``n`` returns the features unchanged.

    Returns:
        ``[batch, side * side, width]``.
    """
    own = math.isqrt(patches.shape[1])
    if own == side:
        return patches
    with torch.autocast(patches.device.type, enabled=False):
        grid = patches.float().transpose(1, 2).unflatten(2, (own, own))
        return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
