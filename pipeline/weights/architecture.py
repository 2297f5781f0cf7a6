"""Reads the architecture of a vision transformer from the shapes of its weights, and, where a file says so, from its settings.

Shapes determine width, depth, patch size, registers, the feed-forward layer, layer scales and the position grid. They do not
determine the number of heads, the activation and the constant of the norms: those come from the settings beside the weights, from
the periods of rotary positions, or from the convention of the published models, and :attr:`Architecture.reasons` says which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline.config.sizes import Size, grid_of, height_width
from pipeline.errors import CheckpointError
from pipeline.untrusted import printable
from pipeline.weights.foreign_names import Layout, Renamed

_HEADS = {192: 3, 1152: 16, 1280: 16, 1408: 16, 1664: 16, 4096: 32}  # published widths whose heads are not 64 wide
_HEAD_WIDTH = 64
_NORMALIZE: dict[Layout, str] = {"open_clip": "openai", "hf_clip": "openai", "hf_siglip": "half", "hf_vit": "half"}
_MAX_SIDE = 4096


@dataclass(frozen=True)
class Hints:
    """What files beside the weights say.

    Attributes:
        model: settings of :class:`~pipeline.models.settings.ModelSettings` by name.
        image_size: side, or height and width, in pixels of the images whose grid the positions have.
        normalize: name of a normalization, as in ``method.augment.normalize``.
        source: the file, for explanations.
        complete: whether ``model`` is the entire architecture, so that shapes need not be read.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    image_size: Size | None = None
    normalize: str | None = None
    source: str = ""
    complete: bool = False


@dataclass(frozen=True)
class Architecture:
    """Architecture of a vision transformer.

    Attributes:
        layout: whose names the weights have.
        model: settings of :class:`~pipeline.models.settings.ModelSettings` by name.
        image_size: side, or height and width, in pixels of the images that the weights were trained on.
        normalize: name of the normalization, as in ``method.augment.normalize``.
        reasons: where each value comes from, by dotted key of the configuration.
    """

    layout: str
    model: dict[str, Any]
    image_size: Size
    normalize: str
    reasons: dict[str, str]


def architecture_of(weights: Renamed, hints: Hints, *, where: str) -> Architecture:
    """Reads the architecture.

    Args:
        weights: tensors under timm's names, :func:`pipeline.weights.foreign_names.renamed`; ``meta`` tensors suffice.
        hints: what files beside the weights say.
        where: the source, for messages.

    Raises:
        CheckpointError: the weights are not of a vision transformer on RGB images, or the number of heads cannot be determined.
    """
    shapes = {name.removeprefix("vit."): tuple(tensor.shape) for name, tensor in weights.tensors.items()}
    chunks = re.compile(r"^blocks\.\d+\.(\d+)\.")
    shapes = {chunks.sub(r"blocks.\1.", name): shape for name, shape in shapes.items()}
    model: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def note(key: str, value: Any, reason: str) -> None:
        model[key] = value
        reasons[f"model.{key}"] = reason

    width, patch = _patches(shapes, where)
    numbers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise CheckpointError(
            f"blocks are missing: it has {len(numbers)}, the last is number {max(numbers, default=-1)}",
            where=where,
            hint="Download the file again, or name another",
        )
    note("embed_dim", width, f"patch_embed.proj.weight is {list(shapes['patch_embed.proj.weight'])}")
    note("patch_size", patch, "the last two sizes of patch_embed.proj.weight")
    note("depth", len(numbers), f"{len(numbers)} blocks")
    rotary = "pos_embed" not in shapes
    tokens = next((shapes[n][-2] for n in ("reg_token", "register_tokens", "storage_tokens") if n in shapes), 0)
    if tokens:
        note("registers", tokens, f"{tokens} register tokens")
    _layers(shapes, width, note, where)
    if rotary:
        note("pos_embed", "rope", "there is no pos_embed")
    heads, reason = _heads(weights.tensors, width, hints, where)
    note("num_heads", heads, reason)
    for key in ("activation", "norm_eps"):
        if key in hints.model:
            note(key, hints.model[key], hints.source)
    if weights.layout in ("hf_siglip",) and "activation" not in model:
        note("activation", "gelu_tanh", "SigLIP's, since no settings are beside the weights")
    if weights.layout in ("dinov2", "hf_dinov2"):
        how = "antialias" if tokens else "offset"
        note("pos_embed_interpolation", how, f"DINOv2's models with{'' if tokens else 'out'} registers")
    size, reason = _image_size(shapes, patch, tokens, hints)
    reasons["method.views.global_size"] = reason
    normalize = hints.normalize or _NORMALIZE.get(weights.layout, "imagenet")
    reasons["method.augment.normalize"] = hints.source if hints.normalize else f"usual for the layout {weights.layout}"
    return Architecture(weights.layout, model, size, normalize, reasons)


def _patches(shapes: Mapping[str, tuple[int, ...]], where: str) -> tuple[int, int]:
    """Width and patch side."""
    shape = shapes.get("patch_embed.proj.weight", ())
    if len(shape) != 4 or shape[2] != shape[3] or min(shape) < 1:
        shown = f"patch_embed.proj.weight is {list(shape)}" if shape else f"names such as {_some(shapes)}"
        raise CheckpointError(
            f"not a vision transformer with square patches ({shown})",
            where=where,
            hint="Give weights of a ViT in the layout of DINOv2, DINOv3, timm, open_clip or Hugging Face",
        )
    if shape[1] != 3:
        raise CheckpointError(
            f"the weights take images of {shape[1]} channels, and shards are decoded to 3 (red, green, blue)",
            where=where,
            hint="Give weights for RGB images",
        )
    pooled = "attn_pool.latent" in shapes
    if "cls_token" not in shapes and not pooled:
        raise CheckpointError(
            "the tower has neither a class token nor attention pooling",
            where=where,
            hint="Choose weights of a tower that has one",
        )
    return shape[0], shape[2]


def _some(shapes: Mapping[str, Any]) -> str:
    return ", ".join(printable(name, limit=60) for name in sorted(shapes)[:3]) or "none"


def _layers(shapes: Mapping[str, tuple[int, ...]], width: int, note: Any, where: str) -> None:
    """Feed-forward layer, layer scale, norm before the blocks, pooling."""
    hidden = next((shapes[n][-1] for n in ("blocks.0.mlp.fc2.weight", "blocks.0.mlp.w3.weight") if n in shapes), 0)
    first = next((shapes[n][0] for n in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.w12.weight") if n in shapes), 0)
    gated = any(f"blocks.0.mlp.{name}.weight" in shapes for name in ("w1", "fc1_g")) or (hidden and first == 2 * hidden)
    if not hidden:
        raise CheckpointError("a block has no feed-forward layer", where=where, hint="Give weights of a plain ViT")
    if gated:
        note("ffn", "swiglu", "three matrices in the feed-forward layer")
        ratio = 4.0 if swiglu_hidden(width, 4.0) == hidden else 1.5 * hidden / width
    else:
        ratio = hidden / width
    if ratio != 4.0:
        note("mlp_ratio", ratio, f"the feed-forward layer is {hidden} wide")
    scaled = any(name in shapes for name in ("blocks.0.ls1.gamma", "blocks.0.gamma_1"))
    note("layer_scale", 1e-5 if scaled else None, "blocks have layer scales" if scaled else "blocks have no layer scales")
    if "norm_pre.weight" in shapes:
        note("pre_norm", True, "there is a norm before the first block")
    if "cls_token" not in shapes:
        note("pooling", "attention", "attention pooling and no class token")


def swiglu_hidden(width: int, ratio: float) -> int:
    """Hidden width of a SwiGLU layer, which has three matrices instead of two, as :func:`build_tower` makes it."""
    return 8 * math.ceil(int(width * ratio * 2 / 3) / 8)


def _heads(tensors: Mapping[str, Tensor], width: int, hints: Hints, where: str) -> tuple[int, str]:
    """Number of heads, and where it comes from."""
    if hints.model.get("num_heads") is not None:
        return int(hints.model["num_heads"]), hints.source
    for name, tensor in tensors.items():
        if name.endswith("rope_embed.periods") and tensor.numel() and width % (4 * tensor.numel()) == 0:
            return width // (4 * tensor.numel()), f"{tensor.numel()} rotary periods, four channels each"
    if width in _HEADS:
        return _HEADS[width], f"that of published models of width {width}; shapes do not show it"
    if width % _HEAD_WIDTH == 0:
        return width // _HEAD_WIDTH, "heads of 64 channels, as in published models; shapes do not show it"
    raise CheckpointError(
        f"the shapes of the weights do not show the number of heads, and no published model has the width {width}",
        where=where,
        hint="Add model.num_heads=NUMBER to the command",
    )


def _image_size(shapes: Mapping[str, tuple[int, ...]], patch: int, registers: int, hints: Hints) -> tuple[Size, str]:
    """Size in pixels, and where it comes from: the size that files name if it has as many positions, else their square."""
    named = hints.image_size if hints.image_size and max(height_width(hints.image_size)) <= _MAX_SIDE else None
    if "pos_embed" in shapes:
        count = shapes["pos_embed"][-2]
        candidates = (count - 1, count, count - 1 - registers) if "cls_token" in shapes else (count,)
        if named is not None and math.prod(grid_of(named, patch)) in candidates and not isinstance(named, int):
            return _multiple(named, patch), hints.source
        for patches in candidates:
            side = math.isqrt(max(patches, 0))
            if side and side * side == patches:
                return side * patch, f"{side} x {side} positions of {patch} pixels"
    if named is not None:
        return _multiple(named, patch), hints.source
    return _multiple(224, patch), "224 pixels, since the weights do not say"


def _multiple(size: Size, patch: int) -> Size:
    """The size in whole patches, at least one."""
    height, width = (max(side // patch, 1) * patch for side in height_width(size))
    return height if height == width else (height, width)
