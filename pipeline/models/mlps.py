"""Projector and predictor MLPs, and LoGo's pair regressor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.initialization import truncated_fan_in
from pipeline.models.norms import GlobalBatchNorm

Norm = Literal["batch", "layer", "none"]


def mlp(
    widths: Sequence[int],
    *,
    norm: Norm = "batch",
    last: Literal["norm", "plain_norm", "none"] = "none",
    bias: bool = True,
    last_bias: bool = False,
    init: Literal["torch", "simclr", "byol"] = "torch",
) -> nn.Sequential:
    """``Linear, norm, ReLU`` for each hidden width, then ``Linear`` and an optional norm.

    Args:
        widths: input, hidden and output widths.
        norm: norm of the hidden layers, and of the last layer if it has one.
        last: what follows the last layer: the norm, the norm without affine parameters, or nothing.
        bias: whether hidden layers have a bias; never before a batch norm, which would cancel it.
        last_bias: whether the last layer has a bias.
        init: initialization: ``nn.Linear``'s, SimCLR's (a normal of standard deviation 0.01), or BYOL's (haiku's truncated
            normal by fan-in); the latter two with zero biases.
    """
    layers = nn.Sequential()
    for before, after in pairwise(widths[:-1]):
        layers.append(nn.Linear(before, after, bias=bias and norm != "batch"))
        layers.extend([*_norm(norm, after), nn.ReLU()])
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last != "none":
        layers.extend(_norm(norm, widths[-1], affine=last == "norm"))
    for layer in layers if init != "torch" else ():
        if isinstance(layer, nn.Linear):
            if init == "simclr":
                nn.init.normal_(layer.weight, std=0.01)
            else:
                truncated_fan_in(layer.weight, corrected=False)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return layers


def _norm(norm: Norm, width: int, *, affine: bool = True) -> list[nn.Module]:
    if norm == "batch":
        return [GlobalBatchNorm(width, affine=affine)]
    return [nn.LayerNorm(width, elementwise_affine=affine)] if norm == "layer" else []


class PairClassifier(nn.Module):
    """LoGo's regressor: the logit that two features are of one image.

    Args:
        width: feature dimension.
        hidden: width of the two hidden layers.
    """

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.first, self.second, self.last = (
            _Layer(2 * width, hidden, bias=False),
            _Layer(hidden, hidden, bias=False),
            _Layer(hidden, 1),
        )
        # Without affine parameters, so that only the linear layers have weights to freeze in a frozen pass.
        self.norms = nn.ModuleList(GlobalBatchNorm(hidden, affine=False) for _ in range(2))

    def forward(self, a: Tensor, b: Tensor, *, frozen: bool = False) -> Tensor:
        """Logits ``[n]`` of the pairs ``[n, width]``.

        Args:
            a, b: the features.
            frozen: send gradients only to the features, not to this module's weights.
        """
        x = F.relu(self.norms[0](self.first(torch.cat([a, b], dim=1), frozen)))
        x = F.relu(self.norms[1](self.second(x, frozen)))
        logits: Tensor = self.last(x, frozen)[:, 0]
        return logits


class _Layer(nn.Linear):
    def forward(self, input: Tensor, frozen: bool = False) -> Tensor:
        if not frozen:
            return super().forward(input)
        return F.linear(input, self.weight.detach(), self.bias.detach() if self.bias is not None else None)
