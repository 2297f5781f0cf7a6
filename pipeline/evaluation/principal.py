"""PCA of patch tokens as RGB images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


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


def sheet(images: Tensor, patches: Tensor, *, mean: Sequence[float], std: Sequence[float], tile: int = 128) -> NDArray[np.uint8]:
    """Images above the PCA of their patches, as one image ``[2 * tile, n * tile, 3]``.

    Args:
        images: normalised, ``[n, 3, size, size]``.
        patches: ``[n, patches, width]``, a square grid of them.
        mean, std: of the normalisation.
        tile: side of one image, pixels.
    """
    colours, _ = principal(patches)
    side = round(patches.shape[1] ** 0.5)
    low = torch.from_numpy(colours).view(len(images), side, side, 3).permute(0, 3, 1, 2)
    shape = (1, 3, 1, 1)
    pixels = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    rows = [F.interpolate(pixels, (tile, tile), mode="bilinear", antialias=True), F.interpolate(low, (tile, tile))]
    grid = torch.cat([row.clamp(0, 1).permute(2, 0, 3, 1).reshape(tile, len(images) * tile, 3) for row in rows])
    pixel_values: NDArray[np.uint8] = (255 * grid).round().byte().numpy()
    return pixel_values
