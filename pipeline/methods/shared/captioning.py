"""Next-token prediction of captions, shared by CoCa and SimVLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline import losses
from pipeline.models.captions import Vocabulary, inside


def prediction_mask(tokens: Tensor, prefix: Tensor | int = 1) -> Tensor:
    """Mask of the positions whose next token is predicted, bool ``[batch, length - 1]``; excludes prefix and padding."""
    position = torch.arange(1, tokens.shape[1], device=tokens.device)
    start = prefix[:, None] if isinstance(prefix, Tensor) else prefix
    return inside(tokens)[:, 1:] & (position >= start)


def caption_nll(
    states: Tensor, tokens: Tensor, mask: Tensor, vocabulary: Vocabulary, rows: int, count: int | None = None
) -> Tensor:
    """Sum of the next token's ``-log p`` over the positions in ``mask``; over all positions if ``mask`` is a fake tensor.

    Args:
        states: hidden states ``[batch, length, width]``.
        tokens: int64 ``[batch, length]``.
        mask: positions to predict, bool ``[batch, length - 1]``.
        vocabulary: the output layer.
        rows: rows of logits in memory at once.
        count: number of positions in ``mask``; if it is not known here, the host waits for the device to count them.
    """
    chosen, targets = states[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    if type(mask) is Tensor:
        positions = mask.flatten().nonzero() if count is None else mask.flatten().nonzero_static(size=count)
        chosen, targets = chosen.index_select(0, positions[:, 0]), targets.index_select(0, positions[:, 0])
    total: Tensor = vocabulary(chosen, lambda x, matrix: losses.token_cross_entropy(x, matrix, targets, rows=rows))
    return total


def average_count(masks: Sequence[Tensor]) -> Tensor:
    """Average number of predicted tokens per micro-batch of the step, over all micro-batches and ranks.

    Each micro-batch's sum is divided by it, so that the mean over micro-batches and ranks is the mean over all tokens: each
    token has the same weight, however the batch is split.
    """
    count = torch.stack([one.sum() for one in masks]).float().mean()
    return losses.mean_over_ranks(count).clamp(min=1e-6)
