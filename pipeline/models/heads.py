"""Projection heads: from a tower's tokens to prototype logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.norms import GlobalBatchNorm

R = TypeVar("R")
Use = Callable[[Tensor, Tensor], R]  # of unit vectors [n, width] and the whole matrix [count, width]


class Prototypes(nn.Module):
    """The bias-free last layer: cosine-like logits of ``[n, width]`` unit vectors against ``count`` prototypes.

    Its parameters are read in its forward alone, which a partitioning engine (ZeRO-3) needs. So whoever wants more than logits,
    or never all of them at once, hands the forward what is to be done with the matrix.

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

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, use: Use[R]) -> R: ...

    def forward(self, x: Tensor, use: Use[R] | None = None) -> Tensor | R:
        """Logits ``[n, count]``, or whatever ``use`` makes of ``x`` and the matrix ``[count, width]``, fp32.

        What ``use`` returns is a tensor or a tuple of tensors, and may not alias the matrix.
        """
        matrix = self.direction if self.gain is None else torch._weight_norm(self.direction, self.gain, 0)
        return F.linear(x, matrix.to(x.dtype)) if use is None else use(x, matrix)


class PrototypeHead(nn.Module):
    """DINO's head: an MLP, an L2 normalisation, then :class:`Prototypes`.

    Args:
        width: features in, the tower's width.
        hidden: width of the hidden layers.
        bottleneck: features that are normalised.
        prototypes: logits out.
        layers: linear layers of the MLP.
        weight_norm: see :class:`Prototypes`.
        batch_norm: whether one over the batch of all ranks follows each hidden layer; DINO's code has it as a choice.
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
        """Logits ``[n, prototypes]`` of tokens ``[n, width]``, or whatever ``use`` makes of their unit vectors and the
        prototypes; ``n`` may be 0."""
        return self.last(self.units(x)) if use is None else self.last(self.units(x), use)

    def units(self, x: Tensor) -> Tensor:
        """Unit vectors ``[n, bottleneck]`` of tokens ``[n, width]``: all that has to be kept of them."""
        hidden = self.mlp(x)
        return F.normalize(hidden.float(), dim=-1, eps=1e-12).to(hidden.dtype)

    def matrix(self, kind: torch.dtype) -> Tensor:
        """A copy of the prototypes as they are used, ``[prototypes, bottleneck]``."""
        nothing = self.last.direction.new_zeros(0)
        return self.last(nothing, lambda _, matrix: matrix.detach().to(kind, copy=True))
