"""Weight initialization as in each method's released code; tests/models/test_initialization.py has a table of them.

timm's own initialization is that of DINOv2: linear layers from a truncated normal of standard deviation 0.02, biases 0, class
token and registers of standard deviation 1e-6. The functions here change what differs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import GluMlp
from timm.models.eva import Eva
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.settings import ModelSettings

TRUNCATED = 0.87962566103423978
"""Standard deviation of a standard normal truncated at two standard deviations."""


def initialize_transformer(vit: Any, settings: ModelSettings) -> None:
    """Reinitializes a timm vision transformer if ``model.init`` selects other than timm's initialization.

    Args:
        vit: a newly created ``VisionTransformer`` or ``Eva`` of timm.
        settings: provides ``init``, and whether a timm name is set.

    Raises:
        ConfigError: ``model.init`` is for ResNets only, or is not available for this model.
    """
    for module in vit.modules():
        if isinstance(module, GluMlp):  # timm initializes half of it near zero, DINOv2 does not
            _truncated_normal(module.fc1)
    if isinstance(vit, Eva):
        if settings.init not in ("timm", "dino"):
            raise ConfigError(
                f"{settings.init}'s initialization does not apply to a tower with rotary positions",
                where="model.init",
                hint="Set it to timm, which is DINOv3's",
            )
        return
    if settings.init == "dino":
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
    elif settings.init == "mocov3":
        _mocov3(vit)
    elif settings.init == "open_clip":
        _open_clip(vit)
    elif settings.init != "timm":
        raise ConfigError(
            f"{settings.init}'s initialization applies to a ResNet, not to a vision transformer",
            where="model.init",
            hint="Choose timm, dino, mocov3 or open_clip",
        )


def initialize_resnet(net: Any, settings: ModelSettings) -> None:
    """Reinitializes a timm ResNet, whose default is torchvision's: ``kaiming_normal`` by fan-out, norms 1 and 0.

    ``mocov3``, ``simclr`` and ``byol`` start the last batch norm of each block at 0; the latter two draw convolutions from a
    truncated normal by fan-in (TensorFlow's with standard deviation ``fan_in ** -0.5``, haiku's with 0.88 of it).

    Raises:
        ConfigError: ``model.init`` is for transformers only.
    """
    if settings.init == "open_clip":
        raise ConfigError("open_clip's initialization does not apply to a ResNet", where="model.init", hint="Choose timm")
    if settings.init in ("timm", "dino"):
        return
    for module in net.modules():
        if hasattr(module, "zero_init_last"):
            module.zero_init_last()
        if settings.init in ("simclr", "byol") and isinstance(module, nn.Conv2d):
            truncated_fan_in(module.weight, corrected=settings.init == "simclr")


@torch.no_grad()
def truncated_fan_in(weight: Tensor, *, corrected: bool) -> None:
    """Fills a weight from a normal of variance 1 / fan-in, truncated at two standard deviations.

    Args:
        weight: of a linear layer or a convolution, filled in place.
        corrected: whether ``fan_in ** -0.5`` is the standard deviation after truncation (TensorFlow) or before it (haiku).
    """
    std = math.prod(weight.shape[1:]) ** -0.5 / (TRUNCATED if corrected else 1.0)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _truncated_normal(layer: nn.Linear) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _mocov3(vit: Any) -> None:
    """Xavier-uniform, with query, key and value as separate layers, and the patch embedding as a linear layer."""
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            _uniform(module.weight, (rows // 3 if name.endswith("qkv") else rows) + columns)
            nn.init.zeros_(module.bias)
    projection = getattr(vit.patch_embed, "proj", None)
    if isinstance(projection, nn.Conv2d):
        _uniform(projection.weight, math.prod(projection.weight.shape[1:]) + projection.weight.shape[0])
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)


def _uniform(weight: Tensor, fans: int) -> None:
    bound = math.sqrt(6.0 / fans)
    nn.init.uniform_(weight, -bound, bound)


def _open_clip(vit: Any) -> None:
    """Attention input Xavier-uniform over query, key and value together, attention output and MLP by ``nn.Linear``'s default;
    tokens and positions with standard deviation ``width ** -0.5``.
    """
    for token in (vit.cls_token, vit.pos_embed):
        if token is not None:
            nn.init.normal_(token, std=vit.embed_dim**-0.5)
    for block in vit.blocks:
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        block.attn.proj.reset_parameters()
        for bias in (block.attn.qkv.bias, block.attn.proj.bias):
            nn.init.zeros_(bias)
        for layer in (block.mlp.fc1, block.mlp.fc2):
            layer.reset_parameters()
