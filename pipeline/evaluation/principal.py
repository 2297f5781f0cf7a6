"""What patches have in common, as colours, and what the class token looks at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluation.subject import Subject


def principal(tokens: Tensor) -> tuple[NDArray[np.float32], float]:
    """The three directions in which tokens differ most, as colours.

    Args:
        tokens: ``[pictures, patches, width]``; the directions are fitted over all pictures together.

    Returns:
        float32 ``[pictures, patches, 3]`` in 0..1 (1st to 99th percentile of each direction), and the share of the variance
        that the three explain.
    """
    flat = tokens.detach().double().cpu().flatten(0, 1)
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat / max(len(flat) - 1, 1))
    three = flat @ vectors[:, -3:].flip(1)
    three = three * torch.where((three**3).sum(0) < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    low, high = torch.quantile(three, 0.01, dim=0), torch.quantile(three, 0.99, dim=0)
    colours = ((three - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    share = float(values[-3:].sum() / values.sum().clamp_min(1e-300))
    return colours.view(*tokens.shape[:2], -1).float().numpy(), share


def sheet(images: Tensor, patches: Tensor, *, mean: Sequence[float], std: Sequence[float], tile: int = 128) -> NDArray[np.uint8]:
    """Pictures above the principal directions of their patches, as one picture ``[2 * tile, n * tile, 3]``.

    Args:
        images: normalised, ``[n, 3, size, size]``.
        patches: ``[n, patches, width]``, a square of them.
        mean, std: of the normalisation.
        tile: side of one picture, pixels.
    """
    colours, _ = principal(patches)
    side = round(patches.shape[1] ** 0.5)
    low = torch.from_numpy(colours).view(len(images), side, side, 3).permute(0, 3, 1, 2)
    shape = (1, 3, 1, 1)
    pixels = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    rows = [F.interpolate(pixels, (tile, tile), mode="bilinear", antialias=True), F.interpolate(low, (tile, tile))]
    whole = torch.cat([row.clamp(0, 1).permute(2, 0, 3, 1).reshape(tile, len(images) * tile, 3) for row in rows])
    found: NDArray[np.uint8] = (255 * whole).round().byte().numpy()
    return found


@torch.inference_mode()
def looked_at(subject: Subject, images: Tensor) -> Tensor:
    """How much of the class token's attention in the last block each patch has, ``[n, patches]``, the mean of all heads.

    Of a tower whose attention is not timm's plain one (rotary positions): the cosine of the patch with the class token.
    """
    attention = subject.tower.vit.blocks[-1].attn
    if type(attention).__name__ != "Attention":
        tokens = subject.tokens(images)
        return F.cosine_similarity(tokens.patches.float(), tokens.cls.float()[:, None], dim=2)
    kept: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, given: kept.append(given[0].detach()))
    try:
        subject.tokens(images)
    finally:
        handle.remove()
    q, k, _ = attention.qkv(kept[0].float()).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    shares = ((q[:, :, :1] * attention.scale) @ k.transpose(2, 3)).softmax(-1)
    found: Tensor = shares[:, :, 0, subject.tower.vit.num_prefix_tokens :].mean(1)
    return found
