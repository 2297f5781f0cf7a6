"""Projection heads: map backbone tokens to prototype logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.norms import GlobalBatchNorm

R = TypeVar("R")
Use = Callable[[Tensor, Tensor], R]  # takes unit vectors [n, width] and the whole matrix [count, width]


class Prototypes(nn.Module):
    """Bias-free last layer: cosine-like logits of ``[n, width]`` unit vectors with ``count`` prototypes.

    Its parameters are read only within its forward pass, as an engine that shards them (ZeRO 3) requires. Callers that need
    more than logits, or need them in chunks, pass a function of the matrix to the forward pass.

    Args:
        width: input dimension.
        count: number of prototypes, the K of DINO.
        weight_norm: DINOv2's form, ``g * v / |v|`` with a trainable gain initialized to 1, so that logits start within ``[-1,
            1]``; otherwise a plain matrix (DINOv3).
    """

    def __init__(self, width: int, count: int, *, weight_norm: bool = True) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(count, width))
        self.gain = nn.Parameter(torch.ones(count, 1)) if weight_norm else None
        if weight_norm:
            nn.init.uniform_(self.direction, -(width**-0.5), width**-0.5)
        else:
            nn.init.trunc_normal_(self.direction, std=0.02)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, use: Use[R]) -> R: ...

    def forward(self, x: Tensor, use: Use[R] | None = None) -> Tensor | R:
        """Logits ``[n, count]``, or the result of ``use`` on ``x`` and the matrix ``[count, width]``, fp32.

        ``use`` returns a tensor or a tuple of tensors, which must not alias the matrix.
        """
        matrix = self.direction if self.gain is None else torch._weight_norm(self.direction, self.gain, 0)
        return F.linear(x, matrix.to(x.dtype)) if use is None else use(x, matrix)


class PrototypeHead(nn.Module):
    """DINO's head: an MLP, L2 normalization, then :class:`Prototypes`.

    Args:
        width: input dimension, the backbone's width.
        hidden: width of the hidden layers.
        bottleneck: dimension of the normalized features.
        prototypes: number of logits.
        layers: linear layers of the MLP.
        weight_norm: see :class:`Prototypes`.
        batch_norm: whether a batch norm, synchronized over all ranks, follows each hidden layer; an option of DINO's code.
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
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = (width, *(hidden,) * (layers - 1), bottleneck)
        self.mlp = nn.Sequential()
        for before, after in pairwise(widths):
            if len(self.mlp):
                self.mlp.extend([GlobalBatchNorm(before), nn.GELU()] if batch_norm else [nn.GELU()])
            self.mlp.append(nn.Linear(before, after))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = Prototypes(bottleneck, prototypes, weight_norm=weight_norm)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, use: Use[R]) -> R: ...

    def forward(self, x: Tensor, use: Use[R] | None = None) -> Tensor | R:
        """Logits ``[n, prototypes]`` of tokens ``[n, width]``, or the result of ``use``; ``n`` may be 0."""
        return self.last(self.units(x)) if use is None else self.last(self.units(x), use)

    def units(self, x: Tensor) -> Tensor:
        """Unit vectors ``[n, bottleneck]`` of tokens ``[n, width]``, from which logits can be computed later."""
        hidden = self.mlp(x)
        return F.normalize(hidden.float(), dim=-1, eps=1e-12).to(hidden.dtype)

    def matrix(self, kind: torch.dtype) -> Tensor:
        """A copy of the prototypes after weight normalization, ``[prototypes, bottleneck]``."""
        nothing = self.last.direction.new_zeros(0)
        return self.last(nothing, lambda _, matrix: matrix.detach().to(kind, copy=True))
