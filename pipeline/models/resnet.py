"""timm ResNets with the interface of a vision tower."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.initialization import initialize_resnet
from pipeline.models.norms import GlobalBatchNorm
from pipeline.models.settings import ModelSettings
from pipeline.models.tokens import Tokens
from pipeline.models.vision import VisionTower, build_tower


class ResNetTower(nn.Module):
    """A ResNet that returns :class:`Tokens`: pooled features as the class token, the last feature map as patches.

    Args:
        net: a timm ResNet without classifier.
        timm_name, timm_args: arguments with which ``timm.create_model`` builds the same network (except for a small stem).
        small_stem: whether the first convolution is 3x3 without stride or pooling, for images of 32 pixels.
    """

    def __init__(self, net: nn.Module, *, timm_name: str, timm_args: dict[str, Any], small_stem: bool) -> None:
        super().__init__()
        self.net = net
        self.timm_name, self.timm_args, self.small_stem = timm_name, timm_args, small_stem
        self.width = int(getattr(net, "num_features"))  # noqa: B009 - of timm's models, unknown to nn.Module
        self.patch = 8 if small_stem else 32

    def forward(self, images: Tensor, *, local: bool = False, patches: Literal["all", "none"] = "all") -> Tokens:
        """Tokens of ``[batch, 3, height, width]``; the other arguments, for vision transformers, are ignored."""
        features = self.net.forward_features(images)  # type: ignore[operator]
        cells = features.flatten(2).transpose(1, 2)
        return Tokens(cls=cells.mean(1), registers=cells[:, :0], patches=cells)


Tower = VisionTower | ResNetTower


def build_trunk(settings: ModelSettings, *, image_size: int) -> Tower:
    """Builds a ResNet if ``model.timm_name`` names one, else a vision transformer.

    Raises:
        ConfigError: timm has no such model.
    """
    name = settings.timm_name or ""
    if "resnet" not in name:
        return build_tower(settings, image_size=image_size)
    if not timm.is_model(name) or timm.models.model_entrypoint(name).__module__ != "timm.models.resnet":
        raise ConfigError(
            f"timm has no plain ResNet {name!r}", where="model.timm_name", hint="Choose resnet18, resnet34 or resnet50"
        )
    args: dict[str, Any] = {"num_classes": 0, "zero_init_last": False}
    net = timm.create_model(name, pretrained=False, norm_layer=GlobalBatchNorm, drop_path_rate=settings.drop_path, **args)
    small = settings.stem == "small"
    if small:
        if not isinstance(net.conv1, nn.Conv2d):
            raise ConfigError(
                f"the deep stem of {name!r} cannot be replaced by a small one",
                where="model.stem",
                hint="Set model.stem=patch, or choose resnet18, resnet34 or resnet50",
            )
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    initialize_resnet(net, settings)
    return ResNetTower(net, timm_name=name, timm_args=args, small_stem=small)


@torch.no_grad()
def freeze_patches(tower: Tower) -> None:
    """Freezes the patch embedding at its random initialization, which stabilizes MoCo v3's transformers (arXiv 2104.02057).

    Raises:
        ConfigError: the tower has no patch embedding.
    """
    if not isinstance(tower, VisionTower):
        raise ConfigError("a ResNet has no patch embedding", where="method.freeze_patches", hint="Set it to false")
    tower.vit.patch_embed.requires_grad_(False)


@torch.no_grad()
def fix_positions(tower: Tower) -> None:
    """Replaces learned positions by fixed sine-cosine ones of row and column.

    Raises:
        ConfigError: the tower has no learned positions, or its width is not divisible by 4.
    """
    where = {"where": "method.pos_embed", "hint": "Set method.pos_embed=learned"}
    if not isinstance(tower, VisionTower) or tower.vit.pos_embed is None:
        raise ConfigError("a ResNet has no position embeddings", **where)
    positions = tower.vit.pos_embed
    (rows, columns), width = tower.vit.patch_embed.grid_size, tower.width
    if width % 4:
        raise ConfigError(f"a width of {width} is not divisible by 4 (sine and cosine of two axes)", **where)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (x, y)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    prefix = positions.shape[1] - rows * columns
    positions.zero_()
    positions[0, prefix:] = table.to(positions)
    positions.requires_grad_(False)
