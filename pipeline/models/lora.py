"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on the attention and MLP projections of a vision tower.

A frozen weight ``W`` becomes ``W + (alpha / rank) * up @ down``, with a random ``down [rank, in]`` and ``up [out, rank]`` of
zeros: the first forward pass is the original's, bit for bit. Names of the original parameters do not change. An EMA teacher holds
the same modules and averages the two factors, not their product. The product of two averages is not the average of products: the
difference is of second order in how far the factors move within the average's memory, and none with ``train_down=False``
(LoRA-FA, arXiv 2308.03303), where only ``up`` is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.reading import read_some
from pipeline.models.vision import VisionTower

DOWN, UP = "lora_down", "lora_up"
_TARGETS = {"attention": ("attn.qkv", "attn.proj"), "mlp": ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")}


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trainable low-rank difference.

    Args:
        base: the layer; its parameters are taken over and frozen.
        rank: rank of the difference.
        alpha: the difference is scaled by ``alpha / rank``.
        train_down: whether the first factor is trained too.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, train_down: bool = True) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, alpha / rank
        self._parameters["weight"], self._parameters["bias"] = base._parameters["weight"], base._parameters["bias"]
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        example: Tensor = base._parameters["weight"]  # type: ignore[assignment]
        self.lora_down = nn.Parameter(example.new_empty(rank, base.in_features), requires_grad=train_down)
        self.lora_up = nn.Parameter(example.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        return F.linear(input, weight, self.bias) + F.linear(F.linear(input, self.lora_down), self.lora_up) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device=self.lora_up.device)
        own: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        layer.weight.copy_(merged_weight(own, self.lora_down, self.lora_up, self.scale))
        if self.bias is not None:
            layer.bias.copy_(self.bias)
        return layer


class _ReadLoRALinear(LoRALinear):
    """Of a layer whose owner reads ``weight`` instead of calling it: timm's rotary attention with separate biases."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The merged weight; its gradient reaches the factors. The frozen part where an engine has sharded it (ZeRO 3), since
        the owner then calls the layer.
        """
        own: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        if own.ndim != 2 or self.lora_up.ndim != 2:
            return own.view(-1)
        with torch.autocast(own.device.type, enabled=False):
            return own + self.scale * (self.lora_up @ self.lora_down)


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``weight + scale * up @ down``, fp32; the product in fp64, so that it is rounded once."""
    return (weight.double() + scale * (up.double() @ down.double())).to(weight.dtype)


def add_lora(tower: VisionTower, targets: Iterable[str], *, rank: int, alpha: float, train_down: bool = True) -> None:
    """Freezes a tower except its mask token and gives its projections adapters; names of its parameters do not change.

    Args:
        tower: the tower, of a student or a teacher.
        targets: ``attention`` for queries, keys, values and output projection, ``mlp`` for the feed-forward layers.
        rank, alpha, train_down: see :class:`LoRALinear`.

    Raises:
        ConfigError: the rank is not below the width of a projection.
    """
    for parameter in tower.parameters():
        parameter.requires_grad_(False)
    tower.mask_token.requires_grad_(True)
    chosen = [name for target in targets for name in _TARGETS[target]]
    for block in tower.vit.blocks:
        for name in chosen:
            owner = block.get_submodule(name.split(".")[0])
            layer = getattr(owner, name.split(".")[1], None)
            if not isinstance(layer, nn.Linear):
                continue
            if rank >= min(layer.in_features, layer.out_features):
                raise ConfigError(
                    f"a rank of {rank} is not below the width of the projection {name}, {min(layer.weight.shape)}",
                    where="adapt.lora.rank",
                    hint="Choose a smaller one, such as 8",
                )
            reads = name == "attn.qkv" and getattr(owner, "q_bias", None) is not None
            kind = _ReadLoRALinear if reads else LoRALinear
            setattr(owner, name.split(".")[1], kind(layer, rank=rank, alpha=alpha, train_down=train_down))
    if tower.vit.reads_some:
        read_some(tower.vit.blocks[-1])


def merge_lora(root: nn.Module) -> None:
    """Replaces all layers with adapters inside a module by plain layers that compute the same."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.merged())
    for tower in (m for m in root.modules() if isinstance(m, VisionTower) and m.vit.reads_some):
        read_some(tower.vit.blocks[-1])


def is_factor(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's factor."""
    return name.rpartition(".")[2] in (DOWN, UP)


def merged_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict with all adapters merged; ``meta`` tensors suffice."""
    merged = {name: tensor for name, tensor in state.items() if not is_factor(name)}
    for layer, down, up in _factors(state):
        name = f"{layer}.weight"
        if name in merged and not merged[name].is_meta:
            merged[name] = merged_weight(merged[name], down, up, scale)
    return merged


def _factors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, down in state.items():
        layer, _, end = name.rpartition(".")
        if end == DOWN and f"{layer}.{UP}" in state:
            yield layer, down, state[f"{layer}.{UP}"]
