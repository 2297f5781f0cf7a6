"""PCA of patch tokens as RGB images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.sizes import grid_of
from pipeline.data.formats.composite import Shown, composite
from pipeline.evaluation.tiles import fitted, letterboxed


def principal(tokens: Tensor) -> tuple[NDArray[np.float32], float]:
    """The first three principal components of the tokens, as colours.

    Args:
        tokens: ``[images, patches, width]``; the components are fitted on all images together.

    Returns:
        float32 ``[images, patches, 3]`` in 0..1 (1st to 99th percentile of each component), and the share of the variance that
        the three explain.
    """
    flat = tokens.detach().double().cpu().flatten(0, 1)
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat / max(len(flat) - 1, 1))
    three = flat @ vectors[:, -3:].flip(1)
    three = three * torch.where((three**3).sum(0) < 0, -1.0, 1.0)  # the sign of an eigenvector is arbitrary
    low, high = torch.quantile(three, 0.01, dim=0), torch.quantile(three, 0.99, dim=0)
    colours = ((three - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    share = float(values[-3:].sum() / values.sum().clamp_min(1e-300))
    return colours.view(*tokens.shape[:2], -1).float().numpy(), share


def sheet(
    images: Tensor,
    patches: Tensor,
    *,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    tile: int = 128,
    shown: Shown | None = None,
) -> NDArray[np.uint8]:
    """Images above the PCA of their patches, as one image ``[2 * tile, n * tile, 3]``; rectangles keep their aspect ratio.

    Args:
        images: normalised, ``[n, channels, height, width]``.
        patches: ``[n, patches, width]``, in rows.
        patch: side of a patch, pixels.
        mean, std: of the normalisation.
        tile: side of one image, pixels.
        shown: channels of the images that are shown as red, green and blue, or ``pca``; ``None`` for RGB images.
    """
    colours, _ = principal(patches)
    grid = grid_of(images.shape[-2:], patch, patches.shape[1])
    low = torch.from_numpy(colours).view(len(images), *grid, 3).permute(0, 3, 1, 2)
    shape = (1, 3, 1, 1)
    if shown is None:
        pixels = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    else:
        views = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
        pixels = torch.from_numpy(np.stack([composite(one, shown) for one in views])).permute(0, 3, 1, 2).float() / 255
    size = fitted((images.shape[-2], images.shape[-1]), tile)
    rows = [F.interpolate(pixels, size, mode="bilinear", antialias=True), F.interpolate(low, size)]
    drawn = [(255 * row.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy() for row in rows]
    return np.concatenate([np.concatenate(list(letterboxed(row, tile)), axis=1) for row in drawn])
