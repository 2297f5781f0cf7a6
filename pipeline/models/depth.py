"""Stochastic depth (arXiv 1603.09382): a block's branch is left out for some samples of a batch.

Two forms. ``rows`` computes the branch for all samples and multiplies it by 0 for those drawn, each on its own. ``subset`` is
DINOv2's: of ``b`` samples a fixed number ``s = max(floor(b * (1 - rate)), 1)`` is drawn, the branch is computed for these alone
and added with weight ``b / s``. That saves the share of the work that is dropped, and shapes never change.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
from timm.layers import DropPath
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.errors import ConfigError


def kept_rows(batch: int, rate: float) -> int:
    """How many of ``batch`` samples a branch is computed for, where ``rate`` of them are to be dropped."""
    return max(int(batch * (1.0 - rate)), 1)


def set_stochastic_depth(
    blocks: nn.Module, rate: float, batched: bool, rates: Literal["constant", "linear"] = "constant"
) -> None:
    """Gives the blocks of a tower their rates; no parameter and no name changes.

    Args:
        blocks: timm's blocks, in a container.
        rate: probability of leaving a branch out, 0 to below 1; of the last block where rates rise.
        batched: compute a branch for a subset of the batch, instead of dropping each sample on its own.
        rates: one for all blocks, or rising linearly from 0 in the first block.

    Raises:
        ConfigError: ``batched`` for a kind of block that is built otherwise.
    """
    block: Any
    last = max(len(list(blocks.children())) - 1, 1)
    for index, block in enumerate(blocks.children()):
        own = rate * index / last if rates == "linear" else rate
        if own <= 0:
            continue
        if not batched:
            block.drop_path1, block.drop_path2 = DropPath(own), DropPath(own)
            continue
        if type(block) not in (Block, EvaBlock):
            raise ConfigError(
                f"blocks of the kind {type(block).__name__} cannot leave samples out of a branch",
                where="model.batched_drop_path",
                hint="set it to false",
            )
        block.drop_path1, block.drop_path2 = nn.Identity(), nn.Identity()
        block.dropped = own
        block.forward = MethodType(_some_rows, block)


def _some_rows(block: Any, x: Tensor, **attention: Any) -> Tensor:
    if not block.training:
        whole: Tensor = type(block).forward(block, x, **attention)
        return whole
    scales = branch_scales(block)
    batch, kept = len(x), kept_rows(len(x), block.dropped)

    rows = torch.randperm(batch, device=x.device)[:kept]
    own = {key: v[rows] if isinstance(v, Tensor) and v.ndim > 2 and len(v) == batch else v for key, v in attention.items()}
    branch = scales[0](block.attn(block.norm1(x[rows]), **own))
    x = x.index_add(0, rows, branch.to(x.dtype), alpha=batch / kept)
    rows = torch.randperm(batch, device=x.device)[:kept]
    branch = scales[1](block.mlp(block.norm2(x[rows])))
    return x.index_add(0, rows, branch.to(x.dtype), alpha=batch / kept)


def whole_block(block: Any, x: Tensor, **attention: Any) -> Tensor:
    """What a block does with all tokens, with the rate that it was given."""
    if hasattr(block, "dropped"):
        return _some_rows(block, x, **attention)
    whole: Tensor = type(block).forward(block, x, **attention)
    return whole


def branch_scales(block: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What a block multiplies its attention's and its feed-forward's output by."""
    return (block.ls1, block.ls2) if isinstance(block, Block) else (_scale(block.gamma_1), _scale(block.gamma_2))


def _scale(gamma: Tensor | None) -> Any:
    return (lambda y: y) if gamma is None else (lambda y: gamma * y)
