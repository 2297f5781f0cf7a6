"""Gram anchoring (DINOv3, arXiv 2508.10104): how alike the patches of a picture are to one another stays as it was."""

from __future__ import annotations

import math

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


def resampled_patches(patches: Tensor, side: int) -> Tensor:
    """Features of a square grid of patches on a grid of another size, fp32: bicubic (a = -0.75), without antialiasing.

    An anchor that sees a crop at twice the size gives four features where the student gives one (DINOv3's choice of resampling).

    Args:
        patches: ``[batch, n * n, width]``.
        side: rows, and columns, of the grid wanted; the grid's own gives the features as they are.

    Returns:
        ``[batch, side * side, width]``.
    """
    own = math.isqrt(patches.shape[1])
    if own == side:
        return patches
    with torch.autocast(patches.device.type, enabled=False):
        grid = patches.float().transpose(1, 2).unflatten(2, (own, own))
        return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
