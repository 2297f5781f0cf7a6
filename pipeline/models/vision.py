"""Vision towers: timm's VisionTransformer, or its Eva with rotary positions, with a mask token and one interface.

The unmodified timm model is ``tower.vit``; only the tower's forward pass differs: it returns all tokens and accepts masks. The
model's state dict loads strictly into the model that ``timm.create_model(tower.timm_name, **tower.timm_args)`` creates.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from types import MethodType
from typing import Any, Literal

import pipeline.models.lean_timm  # noqa: F401

# isort: split

import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config.sizes import Size, is_divisible, size_text
from pipeline.errors import ConfigError
from pipeline.models.depth import set_stochastic_depth
from pipeline.models.initialization import initialize_transformer
from pipeline.models.positions import Resampling, resample_positions
from pipeline.models.reading import filled_up, places, read_some
from pipeline.models.settings import ModelSettings
from pipeline.models.stems import conv_stem
from pipeline.models.tokens import Tokens


class VisionTower(nn.Module):
    """A timm ViT that returns :class:`Tokens` and can replace patches by a learned mask token.

    Args:
        vit: a timm ViT with ``dynamic_img_size`` and no classifier, and with a class token or attention pooling; the pooled
            feature then takes the place of the class token in :class:`Tokens`.
        timm_name: name with which ``timm.create_model`` creates the same model.
        timm_args: its keyword arguments.
        resampling: how learned positions are resampled to a grid of another size, see
            :func:`pipeline.models.positions.resample_positions`.
        local_norm: whether local crops have a final norm of their own (DINOv3, arXiv 2508.10104). It belongs to the tower, not
            to the timm model: evaluation and export do not use it.
        class_position: whether the class token's position is a separate parameter where timm's model has none, as in DINOv2's
            code for models with registers; see :meth:`merge_class_position`.

    Attributes:
        in_channels: channels of the images.
        lr_mult: learning-rate multiplier of all its parameters.
        starts_frozen: whether it is not trained at the start of a run.
    """

    width: int
    patch: int

    def __init__(
        self,
        vit: VisionTransformer | Eva,
        *,
        timm_name: str = "",
        timm_args: dict[str, Any] | None = None,
        resampling: Resampling = "antialias",
        local_norm: bool = False,
        class_position: bool = False,
    ) -> None:
        super().__init__()
        if class_position and (isinstance(vit, Eva) or vit.pos_embed is None or not vit.no_embed_class):
            raise ConfigError(
                "this tower's class token has a position already, or there is none",
                where="model.cls_pos_embed",
                hint="Set it to false, or model.registers above 0 with learned positions",
            )
        self.pooled = vit.cls_token is None and getattr(vit, "attn_pool", None) is not None
        if (vit.cls_token is None and not self.pooled) or not vit.dynamic_img_size or not isinstance(vit.head, nn.Identity):
            raise ConfigError(
                "a tower needs a class token or attention pooling, dynamic_img_size=True and num_classes=0",
                where=f"model.timm_name={timm_name!r}",
                hint="Choose a timm ViT with a class token, such as vit_small_patch16_224",
            )
        if isinstance(vit, Eva) and (vit.rope_mixed or (vit.pos_embed is not None and resampling != "antialias")):
            raise ConfigError(
                "does not support learned rotary frequencies, or resampling of learned positions other than timm's",
                where=f"model.timm_name={timm_name!r}",
                hint="Choose a model with fixed rotary positions, and leave model.pos_embed_interpolation=antialias",
            )
        vit.forward = MethodType(_walk, vit)
        vit.reads_some = not self.pooled and read_some(vit.blocks[-1])  # pooling reads every patch
        self.vit = vit
        self.timm_name, self.timm_args = timm_name, dict(timm_args or {})
        self.width = vit.embed_dim
        self.in_channels = int(self.timm_args.get("in_chans", 3))
        self.patch = int(vit.patch_embed.feat_ratio())
        self.resampling: Resampling = resampling
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.local_norm = copy.deepcopy(vit.norm) if local_norm else None
        self.class_position = nn.Parameter(torch.empty(1, 1, vit.embed_dim)) if class_position else None
        if self.class_position is not None:
            nn.init.trunc_normal_(self.class_position, std=0.02)
        self.checkpointing = self.compiled = False
        self.lr_mult, self.starts_frozen = 1.0, False
        self._fused = bool(vit.blocks[0].attn.fused_attn)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        *,
        local: bool = False,
        patches: Tensor | Literal["all", "none"] = "all",
        capacity: tuple[int, ...] = (),
    ) -> Tokens:
        """Tokens of a batch of images, after the final norm.

        Args:
            images: float ``[batch, channels, height, width]``, sides multiples of the patch size.
            mask: bool ``[batch, patches]``, true where the mask token replaces a patch, before positions are added.
            keep: int64 ``[batch, kept]``, patches to keep after positions are added; all others are dropped.
            local: whether these are local crops, which use the local norm if the tower has one.
            patches: patches to return: all, none, or those at int64 ``[n]`` indices among the patches of the whole batch,
                returned as ``[n, width]``. Unless all are returned, the last block skips the others and the registers.
            capacity: numbers of patches to which compiled blocks fill up the indices, in ascending order, so that ``n`` may vary
                from step to step without another graph: the first that is large enough. What is filled up is not returned.
        """
        # torch's fused attention has no fast bf16 backward on CPUs: 118 ms a block where plain products need 10. Fake tensors use
        # the fused attention, so that their counts are those of a GPU.
        slow = images.device.type == "cpu" and torch.is_autocast_enabled("cpu") and type(images) is Tensor
        fused = self._fused and not slow
        for block in self.vit.blocks:
            block.attn.fused_attn = fused
            # Eva reads this weight outside of its owner's forward pass, where it is empty once an engine has sharded it (ZeRO 3).
            # Then call the owner and add the bias after; otherwise do what timm does, bit for bit.
            if getattr(block.attn, "q_bias", None) is not None and block.attn.qkv._parameters["weight"].ndim != 2:
                block.attn.qkv_bias_separate = True
        norm = self.local_norm if local else None
        read = None if patches == "all" else images.new_zeros(0, dtype=torch.int64) if isinstance(patches, str) else patches
        number = 0 if read is None else len(read)
        if read is not None and self.compiled and number:
            read = filled_up(read, capacity)
        x = self.vit(images, mask, keep, self.mask_token, self.class_position, self.resampling, self.checkpointing, norm, read)
        prefix, batch = self.vit.num_prefix_tokens + self.pooled, len(images)
        if read is not None:
            none = x.new_zeros(batch, 0, x.shape[1])
            return Tokens(cls=x[:batch], registers=none, patches=x[batch : batch + number], kept=keep)
        return Tokens(cls=x[:, 0], registers=x[:, 1:prefix], patches=x[:, prefix:], kept=keep)

    @torch.no_grad()
    def merge_class_position(self) -> None:
        """Adds a separate class token position to the token, so that timm's own model computes the same features."""
        if self.class_position is not None:
            self.vit.cls_token += self.class_position
            self.class_position = None


def embed(
    vit: Any,
    images: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    mask_token: Tensor,
    class_position: Tensor | None,
    resampling: Resampling,
) -> tuple[Tensor, dict[str, Any]]:
    """Input of the first block: all tokens with their learned positions ``[batch, prefix + patches, width]``, and as ``rope`` the
    rotary positions ``[patches, 2 * head width]`` if the model has them; with kept patches, separate ones per sample.
    """
    x = vit.patch_embed(images)
    if mask is not None:
        hidden = mask.reshape(x.shape[:3]).unsqueeze(-1)
        x = torch.where(hidden, mask_token.to(x.dtype), x)
    rope: dict[str, Any] = {}
    if isinstance(vit, Eva):
        x, angles = vit._pos_embed(x)
        rope = {} if angles is None else {"rope": angles}
    elif resampling == "antialias" or vit.pos_embed is None:
        x = vit.patch_drop(vit._pos_embed(x))
    else:
        x = vit.patch_drop(_positioned(vit, x, resampling))
    if class_position is not None:
        x = torch.cat([x[:, :1] + class_position, x[:, 1:]], dim=1)
    if keep is not None:
        prefix = vit.num_prefix_tokens
        chosen = x[:, prefix:].gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :prefix], chosen], dim=1)
        rope = {name: angles[keep].unsqueeze(1) for name, angles in rope.items()}
    return vit.norm_pre(x), rope


def _positioned(vit: VisionTransformer, x: Tensor, how: Resampling) -> Tensor:
    """timm's ``_pos_embed`` with a different resampling."""
    batch, height, width, _ = x.shape
    own = vit.num_prefix_tokens if not vit.no_embed_class else 0
    positions = resample_positions(vit.pos_embed, (height, width), vit.patch_embed.grid_size, prefix=own, how=how)
    first = [token.expand(batch, -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    x = x.flatten(1, 2)
    x = torch.cat([*first, x + positions], dim=1) if vit.no_embed_class else torch.cat([*first, x], dim=1) + positions
    positioned: Tensor = vit.pos_drop(x)
    return positioned


def _walk(
    vit: Any,
    images: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    mask_token: Tensor,
    class_position: Tensor | None,
    resampling: Resampling,
    checkpointing: bool,
    norm: nn.Module | None,
    read: Tensor | None,
) -> Tensor:
    """All tokens ``[batch, prefix + patches, width]``, or class tokens and the patches to read, ``[batch + n, width]``. Runs
    as the model's own forward pass, so that an engine that shards parameters (ZeRO 3) gathers class token and positions in
    time.
    """
    x, rope = embed(vit, images, mask, keep, mask_token, class_position, resampling)
    at = None if read is None or vit.cls_token is None else places(len(x), x.shape[1], vit.num_prefix_tokens, read)
    for block in vit.blocks:
        more = rope | {"read": at} if block is vit.blocks[-1] and vit.reads_some else rope
        x = checkpoint(block, x, use_reentrant=False, **more) if checkpointing else block(x, **more)
    if at is not None and not vit.reads_some:
        x = x.flatten(0, 1)[at]
    tokens: Tensor = (vit.norm if norm is None else norm)(x)
    if vit.cls_token is not None:
        return tokens
    pooled = vit.attn_pool(tokens)
    return torch.cat([pooled[:, None], tokens], dim=1) if read is None else torch.cat([pooled, tokens.flatten(0, 1)[read]])


def build_tower(settings: ModelSettings, *, image_size: Size) -> VisionTower:
    """Builds a vision tower with random weights.

    Args:
        settings: a timm name, or the sizes.
        image_size: side, or height and width, in pixels of the images that set the position embedding's grid; other sizes are
            resampled.

    Raises:
        ConfigError: incompatible sizes, or a timm model that is not a plain ViT with a class token.
    """
    name, args = _timm_call(settings, image_size)
    vit = timm.create_model(name, pretrained=False, **args)
    if isinstance(vit, Eva) and not settings.timm_name:
        _same_start(vit)
    initialize_transformer(vit, settings)
    set_stochastic_depth(vit.blocks, settings.drop_path, settings.batched_drop_path, settings.drop_path_schedule)
    return VisionTower(
        vit,
        timm_name=name,
        timm_args=args,
        resampling=settings.pos_embed_interpolation,
        local_norm=settings.untie_local_norm,
        class_position=settings.cls_pos_embed,
    )


def _same_start(vit: Eva) -> None:
    """Undoes Eva's scaling of each branch's last matrix by depth, which DINOv3 does not have."""
    for block in vit.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)


def _timm_call(settings: ModelSettings, image_size: Size) -> tuple[str, dict[str, Any]]:
    common: dict[str, Any] = {"img_size": image_size, "num_classes": 0, "dynamic_img_size": True}
    if settings.channels != 3:
        common["in_chans"] = settings.channels
    moved = {"shift": settings.rope_shift_coords, "jitter": settings.rope_jitter_coords, "rescale": settings.rope_rescale_coords}
    rotary = {f"rope_{name}_coords": value for name, value in moved.items() if value is not None}
    if settings.timm_name:
        return settings.timm_name, common | _named(settings.timm_name, rotary)
    width, depth, heads, patch = settings.embed_dim, settings.depth, settings.num_heads, settings.patch_size
    if width is None or depth is None or heads is None or patch is None:
        raise ConfigError(
            "neither a timm name nor a complete architecture",
            where="model",
            hint="Set model.timm_name, or embed_dim, depth, num_heads and patch_size",
        )
    if width % heads or not is_divisible(image_size, patch):
        raise ConfigError(
            f"width {width} must be divisible by {heads} heads, and images of {size_text(image_size)} px by {patch} px patches",
            where="model",
            hint="Choose sizes that divide",
        )
    args = common | {
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": settings.mlp_ratio,
        "init_values": settings.layer_scale or None,
        **_plain_options(settings),
    }
    hidden = 8 * math.ceil(int(width * settings.mlp_ratio * 2 / 3) / 8)  # SwiGLU has three matrices instead of two
    if settings.pos_embed == "rope":
        _check_rope(width, heads, settings.stem)
        args |= {"num_reg_tokens": settings.registers, "rope_temperature": settings.rope_base, **rotary}
        if settings.ffn == "swiglu":
            args |= {"mlp_ratio": (hidden + 0.5) / width, "swiglu_mlp": True, "swiglu_align_to": 8}
        return "vit_small_patch16_dinov3_qkvb", args
    if rotary:
        raise _unturned()
    args |= {"reg_tokens": settings.registers, "no_embed_class": settings.registers > 0}
    if settings.ffn == "swiglu":
        args |= {"mlp_ratio": (2 * hidden + 0.5) / width, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if settings.stem == "conv":
        args |= {"patch_size": 1, "embed_layer": conv_stem(patch, width, settings.channels)}
    return "vit_base_patch16_clip_224" if settings.pre_norm else "vit_base_patch16_224", args


def _plain_options(settings: ModelSettings) -> dict[str, Any]:
    """Keyword arguments that differ from those of the timm models whose names are used; absent where they do not."""
    rotary = settings.pos_embed == "rope"
    if rotary and (settings.pre_norm or settings.pooling == "attention"):
        raise ConfigError(
            "a tower with rotary positions has neither a norm before the first block nor attention pooling",
            where="model",
            hint="Set model.pre_norm=false and model.pooling=class_token",
        )
    options: dict[str, Any] = {}
    if settings.activation != "gelu":
        options["act_layer"] = settings.activation
    if settings.norm_eps is not None and settings.norm_eps != (1e-5 if rotary or settings.pre_norm else 1e-6):
        options["norm_layer"] = partial(nn.LayerNorm, eps=settings.norm_eps)
    if settings.pooling == "attention":
        if settings.registers:
            raise ConfigError("attention pooling reads patches only", where="model.registers", hint="Set it to 0")
        options |= {"class_token": False, "global_pool": "map"}
    return options


def _named(name: str, rotary: dict[str, float]) -> dict[str, Any]:
    """Keyword arguments for the timm model of this name, besides sizes."""
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}", where="model.timm_name", hint="See timm.list_models('vit_*')")
    module = timm.models.model_entrypoint(name).__module__
    if module == Eva.__module__:
        return {"global_pool": "token", **rotary}
    if module != VisionTransformer.__module__:
        raise ConfigError(
            f"{name!r} is not a plain vision transformer",
            where="model.timm_name",
            hint="Choose one of timm's vit_* models with a class token or attention pooling",
        )
    if rotary:
        raise _unturned()
    return {}


def _unturned() -> ConfigError:
    return ConfigError(
        "rope_shift_coords, rope_jitter_coords and rope_rescale_coords apply to rotary positions only",
        where="model",
        hint="Set model.pos_embed=rope, or leave them null",
    )


def _check_rope(width: int, heads: int, stem: str) -> None:
    if width // heads % 4:
        raise ConfigError(
            f"heads of width {width // heads} have no room for two axes of rotary positions",
            where="model.num_heads",
            hint="Choose heads whose width is a multiple of 4",
        )
    if stem != "patch":
        raise ConfigError("timm's rotary model has no convolutional stem", where="model.stem", hint="Set model.stem=patch")
