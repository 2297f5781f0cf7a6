"""Vision towers: timm's VisionTransformer, with a mask token, behind one surface.

The timm model is held whole as ``tower.vit``, only its ``forward`` returns all tokens and takes masks: its state dict loads,
strictly, into the model that ``timm.create_model(*tower.timm_name, **tower.timm_args)`` makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import timm
import torch
from timm.layers import DropPath, HybridEmbed, LayerNorm2d, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import ConfigError
from pipeline.models.tokens import Tokens
from pipeline.settings import ModelSettings


class VisionTower(nn.Module):
    """A timm ViT that returns :class:`Tokens` and can hide patches behind a learned mask token.

    Args:
        vit: a timm ViT with a class token, ``dynamic_img_size`` and no classifier.
        timm_name: name to give ``timm.create_model`` for the same model.
        timm_args: its keyword arguments.
    """

    width: int
    patch: int

    def __init__(self, vit: VisionTransformer, *, timm_name: str = "", timm_args: dict[str, Any] | None = None) -> None:
        super().__init__()
        if vit.cls_token is None or not vit.dynamic_img_size or not isinstance(vit.head, nn.Identity):
            raise ConfigError(
                "a tower needs a class token, dynamic_img_size=True and num_classes=0",
                where=f"model.timm={timm_name!r}",
                mend="choose a timm ViT with a class token, such as vit_small_patch16_224",
            )
        vit.forward = MethodType(_walk, vit)
        self.vit = vit
        self.timm_name, self.timm_args = timm_name, dict(timm_args or {})
        self.width = vit.embed_dim
        self.patch = int(vit.patch_embed.feat_ratio())
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.checkpointing = False
        self._fused = bool(vit.blocks[0].attn.fused_attn)

    def forward(self, images: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Tokens:
        """Tokens of a batch of images, normalised by the final norm.

        Args:
            images: float ``[batch, 3, height, width]``, sides multiples of the patch.
            mask: bool ``[batch, patches]``, true where the mask token takes a patch's place, before positions are added.
            keep: int64 ``[batch, kept]``, the only patches to go on with, once positions are added; all others are left out.
        """
        # torch's fused attention has no fast bf16 backward on CPUs: 118 ms a block where plain products need 10.
        fused = self._fused and not (images.device.type == "cpu" and torch.is_autocast_enabled("cpu"))
        for block in self.vit.blocks:
            block.attn.fused_attn = fused
        x = self.vit(images, mask, self.mask_token, self.checkpointing, keep)
        prefix = self.vit.num_prefix_tokens
        return Tokens(cls=x[:, 0], registers=x[:, 1:prefix], patches=x[:, prefix:], kept=keep)


def _walk(
    vit: VisionTransformer,
    images: Tensor,
    mask: Tensor | None,
    mask_token: Tensor,
    checkpointing: bool,
    keep: Tensor | None = None,
) -> Tensor:
    """All tokens ``[batch, prefix + patches, width]``. The model's own forward, so that an engine that cuts parameters (ZeRO 3)
    knows when the class token and the positions are wanted."""
    x = vit.patch_embed(images)
    if mask is not None:
        hidden = mask.reshape(x.shape[:3]).unsqueeze(-1)
        x = torch.where(hidden, mask_token.to(x.dtype), x)
    x = vit.patch_drop(vit._pos_embed(x))
    if keep is not None:
        prefix, patches = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
        x = torch.cat([prefix, patches.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))], dim=1)
    x = vit.norm_pre(x)
    for block in vit.blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
    tokens: Tensor = vit.norm(x)
    return tokens


def build_tower(settings: ModelSettings, *, image_size: int) -> VisionTower:
    """Builds a tower with random weights.

    Args:
        settings: a timm name, or the sizes; ``drop_path`` holds for all blocks alike, as in DINOv2.
        image_size: side of the images whose grid the position embedding is made for, pixels; other sizes are resampled.

    Raises:
        ConfigError: sizes that do not divide, or a timm model that is no plain ViT with a class token.
    """
    name, args = _timm_call(settings, image_size)
    vit = timm.create_model(name, pretrained=False, **args)
    for block in vit.blocks if settings.drop_path > 0 else ():
        block.drop_path1, block.drop_path2 = DropPath(settings.drop_path), DropPath(settings.drop_path)
    return VisionTower(vit, timm_name=name, timm_args=args)


def _timm_call(settings: ModelSettings, image_size: int) -> tuple[str, dict[str, Any]]:
    common: dict[str, Any] = {"img_size": image_size, "num_classes": 0, "dynamic_img_size": True}
    if settings.timm:
        if not timm.is_model(settings.timm):
            raise ConfigError(f"timm has no model {settings.timm!r}", where="model.timm", mend="see timm.list_models('vit_*')")
        if timm.models.model_entrypoint(settings.timm).__module__ != VisionTransformer.__module__:
            raise ConfigError(
                f"{settings.timm!r} is no plain vision transformer",
                where="model.timm",
                mend="choose one of timm's vit_* models with a class token",
            )
        return settings.timm, common
    width, depth, heads, patch = settings.width, settings.depth, settings.heads, settings.patch
    if width is None or depth is None or heads is None or patch is None:
        raise ConfigError(
            "neither a timm name nor a whole architecture", where="model", mend="set model.timm, or width, depth, heads and patch"
        )
    if width % heads or image_size % patch:
        raise ConfigError(
            f"width {width} over {heads} heads, pictures of {image_size} px over patches of {patch} px",
            where="model",
            mend="choose sizes that divide",
        )
    args = common | {
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": settings.mlp_ratio,
        "init_values": settings.layer_scale or None,
        "reg_tokens": settings.registers,
        "no_embed_class": settings.registers > 0,
    }
    if settings.ffn == "swiglu":
        hidden = 8 * math.ceil(int(width * settings.mlp_ratio * 2 / 3) / 8)
        args |= {"mlp_ratio": 2 * hidden / width, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if settings.stem == "conv":
        args |= {"patch_size": 1, "embed_layer": conv_stem(patch, width)}
    return "vit_base_patch16_224", args


def conv_stem(patch: int, width: int) -> Callable[..., nn.Module]:
    """An ``embed_layer`` for timm: stride-2 3x3 convolutions, norm, GELU, down to one token a patch ("Early convolutions
    help transformers see better", arXiv 2106.14881).

    Args:
        patch: pixels a side of a token, a power of two.
        width: channels of a token; each earlier convolution has half the channels of the next.
    """
    halvings = int(math.log2(patch)) if patch > 0 else 0
    if patch != 2**halvings or halvings < 1:
        raise ConfigError(f"a conv stem of patch {patch}", where="model.patch", mend="choose 2, 4, 8, 16 or 32")
    channels = tuple(width // 2 ** (halvings - i) for i in range(halvings))

    def embed(**kwargs: Any) -> nn.Module:
        stem = ConvStem(
            depth=halvings + 1,
            channels=(*channels, width),
            kernel_size=(3,) * halvings + (1,),
            stride=(2,) * halvings + (1,),
            norm_layer=LayerNorm2d,
            act_layer=nn.GELU,
        )
        return partial(HybridEmbed, backbone=stem, proj=False)(**kwargs)

    return embed
