"""Projection heads: from a tower's tokens to prototype logits."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """The bias-free last layer: cosine-like logits of ``[n, width]`` unit vectors against ``count`` prototypes.

    Its forward uses its own parameters, which a partitioning engine (ZeRO-3) needs.

    Args:
        width: features in.
        count: prototypes, the K of DINO.
        weight_norm: DINOv2's form, ``g * v / |v|`` with a trainable gain that starts at 1, so that logits start within
            ``[-1, 1]``; otherwise a plain matrix (DINOv3).
    """

    def __init__(self, width: int, count: int, *, weight_norm: bool = True) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(count, width))
        self.gain = nn.Parameter(torch.ones(count, 1)) if weight_norm else None
        if weight_norm:
            nn.init.uniform_(self.direction, -(width**-0.5), width**-0.5)
        else:
            nn.init.trunc_normal_(self.direction, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, count]``."""
        if self.gain is None:
            return F.linear(x, self.direction)
        norm = torch.linalg.vector_norm(self.direction, dim=1, keepdim=True, dtype=torch.float32)
        return F.linear(x, (self.direction * (self.gain / norm)).to(x.dtype))


class PrototypeHead(nn.Module):
    """DINO's head: an MLP without batch norm, an L2 normalisation, then :class:`Prototypes`.

    Args:
        width: features in, the tower's width.
        hidden: width of the hidden layers.
        bottleneck: features that are normalised.
        prototypes: logits out.
        layers: linear layers of the MLP.
        weight_norm: see :class:`Prototypes`.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 65536,
        layers: int = 3,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        widths = (width, *(hidden,) * (layers - 1), bottleneck)
        self.mlp = nn.Sequential()
        for before, after in pairwise(widths):
            self.mlp.extend([nn.GELU(), nn.Linear(before, after)] if len(self.mlp) else [nn.Linear(before, after)])
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = Prototypes(bottleneck, prototypes, weight_norm=weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, prototypes]`` of tokens ``[n, width]``; ``n`` may be 0."""
        hidden = self.mlp(x)
        unit = F.normalize(hidden.float(), dim=-1, eps=1e-12).to(hidden.dtype)
        return self.last(unit)
