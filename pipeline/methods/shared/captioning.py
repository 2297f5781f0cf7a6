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


def caption_nll(states: Tensor, tokens: Tensor, mask: Tensor, vocabulary: Vocabulary, rows: int) -> Tensor:
    """Sum of the next token's ``-log p`` over the positions in ``mask``; over all positions if ``mask`` is a fake tensor."""
    choose = (lambda x: x[mask]) if type(mask) is Tensor else (lambda x: x.flatten(0, 1))
    chosen, targets = choose(states[:, :-1]), choose(tokens[:, 1:])
    total: Tensor = vocabulary(chosen, lambda x, matrix: losses.token_cross_entropy(x, matrix, targets, rows=rows))
    return total


def average_count(masks: Sequence[Tensor]) -> Tensor:
    """Average number of predicted tokens per micro-batch of the step, over all micro-batches and ranks.

    Each micro-batch's sum is divided by it, so that the mean over micro-batches and ranks is the mean over all tokens: each
    token has the same weight, however the batch is split.
    """
    count = torch.stack([one.sum() for one in masks]).float().mean()
    return losses.mean_over_ranks(count).clamp(min=1e-6)
