"""Attention of a vision transformer's class token to the patches, without materializing whole attention maps."""

from __future__ import annotations

from types import MethodType
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.tokens import Tokens
from pipeline.models.vision import VisionTower


def with_attention(tower: VisionTower, images: Tensor, *, layers: Literal["all", "last"] = "all") -> Tokens:
    """The tower's tokens, with the class token's attention to each patch in ``attention``.

    Attention is ``softmax(q_cls @ K.T / sqrt(d))``, averaged over heads and over the selected layers; the entries of class
    token and registers are dropped without renormalization. Takes the memory of one attention row per head.

    Args:
        tower: a timm ViT without rotary positions.
        images: ``[batch, 3, height, width]``.
        layers: blocks whose attention is averaged.

    Raises:
        ConfigError: the tower has an unsupported kind of attention.
    """
    blocks = list(tower.vit.blocks)[0 if layers == "all" else -1 :]
    if not all(isinstance(block.attn, Attention) for block in blocks):
        raise ConfigError(
            "the class token's attention cannot be read from this tower",
            where="model",
            hint="Choose a tower with learned positions",
        )
    layers_read: list[Any] = [_with_slot(block.attn, tower.vit.num_prefix_tokens) for block in blocks]
    for layer in layers_read:
        layer.rows = []
    try:
        tokens: Tokens = tower(images)
        rows: list[Tensor] = [layer.rows.pop() for layer in layers_read]
    finally:
        for layer in layers_read:
            layer.rows = None
    return tokens._replace(attention=torch.stack(rows).mean(0))


def _with_slot(attention: Any, prefix: int) -> Any:
    """The layer that computes queries and keys, made to append the class token's row to its own list ``rows``, if it has one.

    A compiler guards a block's graph on everything that the block reads: with a hook, or one list for all blocks, each block
    would need a graph of its own. Parameters and names do not change.
    """
    layer = attention.qkv
    if not hasattr(layer, "rows"):
        layer.rows, layer.source, layer.product = None, (attention, prefix), layer.forward  # a tuple: no submodule
        layer.forward = MethodType(_project, layer)
    return layer


def _project(layer: Any, x: Tensor) -> Tensor:
    qkv: Tensor = layer.product(x)
    if layer.rows is not None:
        attention, prefix = layer.source
        layer.rows.append(_row(attention, prefix, qkv))
    return qkv


def _row(attention: Any, prefix: int, qkv: Tensor) -> Tensor:
    """The class token's attention to each patch, the mean over heads, ``[batch, patches]`` fp32."""
    q, k, _ = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    first = attention.q_norm(q[:, :, :1]).float() * attention.scale
    with torch.autocast(qkv.device.type, enabled=False):
        row: Tensor = (first @ attention.k_norm(k).float().transpose(-2, -1)).softmax(-1)
    return row[:, :, 0, prefix:].mean(1)


def kept_and_removed(
    attention: Tensor, grid: int, ratio: float, *, cells: bool = True, plus_one: bool = True
) -> tuple[Tensor, Tensor]:
    """Selects the patches with the most attention from the class token as visible.

    Args:
        attention: ``[batch, grid * grid]``.
        grid: patches per side.
        ratio: fraction of the cells to keep.
        cells: select cells of 2 x 2 patches by their mean attention; else each patch is a cell.
        plus_one: keep ``int(cells * ratio) + 1``, as in DetailCLIP's code; else the nearest number, at least one.

    Returns:
        int64 positions ``[batch, kept]`` and ``[batch, removed]``, ascending; at least one patch is removed.

    Raises:
        ConfigError: the grid's side is odd, so it has no cells.
    """
    if cells and grid % 2:
        raise ConfigError(
            f"a grid of {grid} patches per side is not divisible into cells of 2 x 2",
            where="method.mask_unit",
            hint="Choose patch, or another size",
        )
    scores = attention.unflatten(1, (grid, grid))
    if cells:
        scores = scores.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))
    flat = scores.flatten(1)
    count = flat.shape[1]
    number = int(count * ratio) + 1 if plus_one else max(1, round(count * ratio))
    ranked = flat.argsort(dim=1, descending=True, stable=True)[:, : min(number, count - 1)]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, ranked, True)
    if cells:
        chosen = chosen.unflatten(1, (grid // 2, grid // 2)).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    kept = min(number, count - 1) * (4 if cells else 1)
    return order[:, :kept], order[:, kept:]
