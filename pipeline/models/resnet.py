"""timm's ResNet behind the surface of a vision tower: for the methods that were made with one."""

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
    """A ResNet that returns :class:`Tokens`: its pooled features as the class token, its last map as patches.

    Args:
        net: a timm ResNet without classifier.
        timm_name, timm_args: what to give ``timm.create_model`` for the same network (with a small stem, but for the stem).
        small_stem: whether the first convolution is 3x3 without stride and no pooling follows it, for pictures of 32 pixels.
    """

    def __init__(self, net: nn.Module, *, timm_name: str, timm_args: dict[str, Any], small_stem: bool) -> None:
        super().__init__()
        self.net = net
        self.timm_name, self.timm_args, self.small_stem = timm_name, timm_args, small_stem
        self.width = int(getattr(net, "num_features"))  # noqa: B009 - of timm's models, unknown to nn.Module
        self.patch = 8 if small_stem else 32

    def forward(self, images: Tensor, *, local: bool = False, patches: Literal["all", "none"] = "all") -> Tokens:
        """Tokens of ``[batch, 3, height, width]``; the rest is for towers that treat local crops, or what is read, otherwise."""
        features = self.net.forward_features(images)  # type: ignore[operator]
        cells = features.flatten(2).transpose(1, 2)
        return Tokens(cls=cells.mean(1), registers=cells[:, :0], patches=cells)


Tower = VisionTower | ResNetTower


def build_trunk(settings: ModelSettings, *, image_size: int) -> Tower:
    """A ResNet where ``model.timm_name`` names one, else a vision transformer.

    Raises:
        ConfigError: timm knows no such network.
    """
    name = settings.timm_name or ""
    if "resnet" not in name:
        return build_tower(settings, image_size=image_size)
    if not timm.is_model(name) or timm.models.model_entrypoint(name).__module__ != "timm.models.resnet":
        raise ConfigError(
            f"timm has no plain ResNet {name!r}", where="model.timm_name", hint="choose resnet18, resnet34 or resnet50"
        )
    args: dict[str, Any] = {"num_classes": 0, "zero_init_last": False}
    net = timm.create_model(name, pretrained=False, norm_layer=GlobalBatchNorm, drop_path_rate=settings.drop_path, **args)
    small = settings.stem == "small"
    if small:
        if not isinstance(net.conv1, nn.Conv2d):
            raise ConfigError(
                f"the deep stem of {name!r} cannot be made a small one",
                where="model.stem",
                hint="set model.stem=patch, or choose resnet18, resnet34 or resnet50",
            )
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    initialize_resnet(net, settings)
    return ResNetTower(net, timm_name=name, timm_args=args, small_stem=small)


@torch.no_grad()
def freeze_patches(tower: Tower) -> None:
    """Leaves the patch embedding at its random start for ever, which steadies MoCo v3's transformers (arXiv 2104.02057).

    Raises:
        ConfigError: the tower has none.
    """
    if not isinstance(tower, VisionTower):
        raise ConfigError("a ResNet has no patch embedding", where="method.freeze_patches", hint="set it to false")
    tower.vit.patch_embed.requires_grad_(False)


@torch.no_grad()
def fix_positions(tower: Tower) -> None:
    """Positions that are sines and cosines of row and column instead of learned ones, and stand still.

    Raises:
        ConfigError: the tower has no learned positions, or a width that does not divide by 4.
    """
    where = {"where": "method.pos_embed", "hint": "set method.pos_embed=learned"}
    if not isinstance(tower, VisionTower) or tower.vit.pos_embed is None:
        raise ConfigError("the tower has no positions to fix", **where)
    positions = tower.vit.pos_embed
    (rows, columns), width = tower.vit.patch_embed.grid_size, tower.width
    if width % 4:
        raise ConfigError(f"a width of {width} does not hold sine and cosine of two axes", **where)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (x, y)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    prefix = positions.shape[1] - rows * columns
    positions.zero_()
    positions[0, prefix:] = table.to(positions)
    positions.requires_grad_(False)
