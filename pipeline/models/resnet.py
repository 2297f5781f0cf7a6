"""timm ResNets with the interface of a vision tower."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from pipeline.config.sizes import Size
from pipeline.errors import ConfigError
from pipeline.models.initialization import initialize_resnet
from pipeline.models.norms import GlobalBatchNorm
from pipeline.models.settings import ModelSettings
from pipeline.models.tokens import Tokens
from pipeline.models.vision import VisionTower, build_tower

OTHER_NETWORKS = ("_pruned", "_gn")  # timm fixes the widths of the former; the latter has no batch norm

Stem = Literal["patch", "small", "small_pooled"]


class ResNetTower(nn.Module):
    """A ResNet that returns :class:`Tokens`: pooled features as the class token, the last feature map as patches.

    Args:
        net: a timm ResNet without classifier.
        timm_name, timm_args: arguments with which ``timm.create_model`` builds the same network (except for a small stem).
        stem: ``patch`` is timm's own; otherwise see :func:`_shrink_stem`.
        channels_last: whether feature maps are laid out with channels innermost. The weights are not: an engine arranges them
            itself, and a convolution reorders what it reads.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        timm_name: str,
        timm_args: dict[str, Any],
        stem: Stem = "patch",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.channels_last = net, channels_last
        self.timm_name, self.timm_args, self.stem = timm_name, timm_args, stem
        self.in_channels = int(timm_args.get("in_chans", 3))
        self.width = int(getattr(net, "num_features"))  # noqa: B009 - of timm's models, unknown to nn.Module
        self.patch = {"patch": 32, "small_pooled": 16, "small": 8}[stem]

    def forward(self, images: Tensor, *, local: bool = False, patches: Literal["all", "none"] = "all") -> Tokens:
        """Tokens of ``[batch, channels, height, width]``; the other arguments, for vision transformers, are ignored."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.net.forward_features(images)  # type: ignore[operator]
        cells = features.flatten(2).transpose(1, 2)
        return Tokens(cls=cells.mean(1), registers=cells[:, :0], patches=cells)


Tower = VisionTower | ResNetTower


def build_trunk(settings: ModelSettings, *, image_size: Size) -> Tower:
    """Builds a ResNet if ``model.timm_name`` names one, else a vision transformer.

    Raises:
        ConfigError: timm has no such model, or cannot make it so narrow.
    """
    name = settings.timm_name or ""
    if "resnet" not in name:
        return build_tower(settings, image_size=image_size)
    known = timm.is_model(name) and timm.models.model_entrypoint(name).__module__ == "timm.models.resnet"
    if not known or name.endswith(OTHER_NETWORKS):
        raise ConfigError(
            f"timm has no plain ResNet {name!r}", where="model.timm_name", hint="Choose resnet18, resnet34 or resnet50"
        )
    stem: Stem = "patch" if settings.stem == "conv" else settings.stem
    args: dict[str, Any] = {"num_classes": 0, "zero_init_last": False, **_sizes(name, settings)}
    if settings.channels != 3:
        args["in_chans"] = settings.channels
    try:
        net = timm.create_model(name, pretrained=False, norm_layer=GlobalBatchNorm, drop_path_rate=settings.drop_path, **args)
    except (ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise ConfigError(
            f"timm cannot make a {name} {settings.resnet_width} channels wide ({error})",
            where="model.resnet_width",
            hint="Choose a larger width, or resnet18",
        ) from error
    if stem != "patch":
        _shrink_stem(net, pool=stem == "small_pooled", channels=settings.channels)
    initialize_resnet(net, settings)
    return ResNetTower(net, timm_name=name, timm_args=args, stem=stem, channels_last=settings.channels_last)


def _sizes(name: str, settings: ModelSettings) -> dict[str, Any]:
    """timm's keyword arguments for the widths and depths of the stages; empty if none is set.

    The stem of a narrow ResNet has the channels of its first stage, unless it is timm's single convolution, which always has 64.
    """
    sizes: dict[str, Any] = {"layers": settings.resnet_blocks} if settings.resnet_blocks else {}
    width = settings.resnet_width
    if width is None:
        return sizes
    sizes["channels"] = tuple(width * 2**stage for stage in range(4))
    with torch.device("meta"):
        deep = not isinstance(timm.create_model(name, num_classes=0).conv1, nn.Conv2d)
    if deep:
        sizes["stem_width"] = width // 2
    elif settings.stem != "patch":  # the only stem of timm's whose width can be chosen; it is replaced by a small one
        sizes |= {"stem_type": "deep", "stem_width": width // 2}
    return sizes


def _shrink_stem(net: Any, *, pool: bool, channels: int) -> None:
    """Replaces the stem, also a deep one, by a 3x3 convolution of stride 1, with 3x3 max pooling of stride 2 or without."""
    net.conv1 = nn.Conv2d(channels, net.feature_info[0]["num_chs"], 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()


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
