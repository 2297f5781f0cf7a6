"""Computes a transformer's last block only for the tokens whose output is used.

A block needs keys and values of all tokens, but its output, and everything after the attention, only where it is used: at the
class token of a local crop, at the masked patches of a global one. Skipping the rest does not change any used output.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.models.depth import branch_scales, kept_rows, run_block, selected


def read_some(block: Any) -> bool:
    """Makes a block accept the argument ``read``, int64 ``[n]``, indices into the batch's tokens, sample after sample; the
    block then returns ``[n, width]``. Returns whether the block is supported; parameters and names do not change.
    """
    if type(block) not in (Block, EvaBlock):
        return False
    projection = block.attn.proj
    projection.read = None
    projection.forward = MethodType(_project, projection)
    block.forward = MethodType(_forward, block)
    return True


def places(batch: int, tokens: int, prefix: int, patches: Tensor) -> Tensor:
    """Indices of the class tokens and of some patches among all tokens of a batch, int64 ``[batch + n]``.

    Args:
        batch: number of samples.
        tokens: tokens per sample.
        prefix: tokens per sample before its first patch.
        patches: int64 ``[n]``, indices among all patches of the batch.
    """
    each = tokens - prefix
    samples = torch.arange(batch, device=patches.device)
    return torch.cat([samples * tokens, patches + (patches // each + 1) * prefix])


def filled_up(patches: Tensor, capacity: tuple[int, ...]) -> Tensor:
    """Indices int64 ``[n]`` followed by zeros, up to the first capacity that is large enough; unchanged if there is none."""
    size = next((size for size in capacity if size >= len(patches)), len(patches))
    return torch.nn.functional.pad(patches, (0, size - len(patches)))


def _project(projection: Any, x: Tensor) -> Tensor:
    rows = x if projection.read is None else x.flatten(0, 1)[projection.read]
    projected: Tensor = type(projection).forward(projection, rows)
    return projected


def _forward(block: Any, x: Tensor, read: Tensor | None = None, **attention: Any) -> Tensor:
    if read is None:
        return run_block(block, x, **attention)
    batch, tokens, _ = x.shape
    sample, token = read // tokens, read % tokens
    scales = branch_scales(block)

    rows, weight = _drawn(block, block.drop_path1, x)
    if rows is None:
        branch = _attend(block, x, read, attention)
    else:
        position = rows.new_zeros(batch).index_copy_(0, rows, torch.arange(len(rows), device=x.device))
        own = selected(attention, rows, batch)
        branch = _attend(block, x.index_select(0, rows), position[sample] * tokens + token, own)
    x = x.flatten(0, 1).index_select(0, read)
    x = x + (weight[sample] * scales[0](branch)).to(x.dtype)
    _, weight = _drawn(block, block.drop_path2, x.new_empty(batch, 1))
    return x + (weight[sample] * scales[1](block.mlp(block.norm2(x)))).to(x.dtype)


def _drawn(block: Any, drop_path: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """The samples whose branch is computed, ``None`` for all, and the weight ``[batch, 1]`` of each sample's branch; uses the
    same random draws as the full block, so that the same samples are dropped.
    """
    batch, rate = len(x), getattr(block, "dropped", 0.0) if block.training else 0.0
    if not rate:
        weight: Tensor = drop_path(x.new_ones(batch, 1))
        return None, weight
    rows = torch.randperm(batch, device=x.device)[: kept_rows(batch, rate)]
    return rows, x.new_zeros(batch, 1).index_fill_(0, rows, batch / len(rows))


def _attend(block: Any, x: Tensor, read: Tensor, attention: dict[str, Any]) -> Tensor:
    """The attention's output at selected tokens, ``[n, width]``."""
    block.attn.proj.read = read
    try:
        branch: Tensor = block.attn(block.norm1(x), **attention)
    finally:
        block.attn.proj.read = None
    return branch
