"""Resampling of learned position embeddings to another grid, in the variants that public weights use."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

Resampling = Literal["antialias", "offset", "plain"]


def resample_positions(
    positions: Tensor, new: tuple[int, int], old: tuple[int, int], *, prefix: int = 0, how: Resampling = "antialias"
) -> Tensor:
    """Bicubic resampling of a position embedding, in fp32; the same grid returns the embedding itself.

    Args:
        positions: ``[1, prefix + old patches, width]``; the prefix (class token, registers) is unchanged.
        new: target rows and columns.
        old: current rows and columns.
        prefix: tokens before the patches.
        how: ``antialias`` as timm and DINOv2's models with registers; ``offset`` as DINOv2's models without registers, whose
            sampling grid is stretched by 0.1 of a patch; ``plain`` bicubic.
    """
    if new == old:
        return positions
    if how != "offset":
        resampled: Tensor = resample_abs_pos_embed(
            positions, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix, antialias=how == "antialias"
        )
        return resampled
    first, grid = positions[:, :prefix], positions[:, prefix:]
    grid = grid.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([first, grid.to(positions.dtype)], dim=1)
