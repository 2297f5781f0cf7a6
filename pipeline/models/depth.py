"""Stochastic depth (arXiv 1603.09382): skips a block's branch for some samples of a batch.

Two variants. ``rows`` computes the branch for all samples and multiplies it by 0 for independently drawn samples. ``subset``
is DINOv2's: of ``b`` samples a fixed number ``s = max(floor(b * (1 - rate)), 1)`` is drawn, the branch is computed only for
these and added with weight ``b / s``. It saves the compute of the skipped samples, and shapes are constant.
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
    """Number of samples for which a branch is computed, of ``batch`` samples at drop rate ``rate``."""
    return max(int(batch * (1.0 - rate)), 1)


def set_stochastic_depth(
    blocks: nn.Module, rate: float, batched: bool, rates: Literal["constant", "linear"] = "constant"
) -> None:
    """Sets the drop rates of a tower's blocks; parameters and names do not change.

    Args:
        blocks: timm's blocks, in a container.
        rate: probability of skipping a branch, 0 to below 1; that of the last block if rates rise.
        batched: compute a branch for a subset of the batch, instead of dropping each sample independently.
        rates: the same for all blocks, or rising linearly from 0 in the first block.

    Raises:
        ConfigError: ``batched`` for an unsupported kind of block.
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
                f"{type(block).__name__} blocks cannot drop samples from a branch",
                where="model.batched_drop_path",
                hint="Set it to false",
            )
        block.drop_path1, block.drop_path2 = nn.Identity(), nn.Identity()
        block.dropped = own
        block.forward = MethodType(_some_rows, block)


def _some_rows(block: Any, x: Tensor, **attention: Any) -> Tensor:
    # index_select, not x[rows]: its backward pass is one kernel, that of indexing sorts the rows first.
    if not block.training:
        output: Tensor = type(block).forward(block, x, **attention)
        return output
    scales = branch_scales(block)
    batch, kept = len(x), kept_rows(len(x), block.dropped)

    rows = torch.randperm(batch, device=x.device)[:kept]
    own = selected(attention, rows, batch)
    branch = scales[0](block.attn(block.norm1(x.index_select(0, rows)), **own))
    x = x.index_add(0, rows, branch.to(x.dtype), alpha=batch / kept)
    rows = torch.randperm(batch, device=x.device)[:kept]
    branch = scales[1](block.mlp(block.norm2(x.index_select(0, rows))))
    return x.index_add(0, rows, branch.to(x.dtype), alpha=batch / kept)


def selected(attention: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """Arguments of attention for some samples: tensors with one part for each sample of the batch are narrowed to ``rows``."""
    each = {key: isinstance(v, Tensor) and v.ndim > 2 and len(v) == batch for key, v in attention.items()}
    return {key: v.index_select(0, rows) if each[key] else v for key, v in attention.items()}


def run_block(block: Any, x: Tensor, **attention: Any) -> Tensor:
    """A block's forward pass over all tokens, with its drop rate."""
    if hasattr(block, "dropped"):
        return _some_rows(block, x, **attention)
    output: Tensor = type(block).forward(block, x, **attention)
    return output


def branch_scales(block: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Functions that apply a block's LayerScale to the outputs of its attention and of its feed-forward layer."""
    return (block.ls1, block.ls2) if isinstance(block, Block) else (_scale(block.gamma_1), _scale(block.gamma_2))


def _scale(gamma: Tensor | None) -> Any:
    return (lambda y: y) if gamma is None else (lambda y: gamma * y)
