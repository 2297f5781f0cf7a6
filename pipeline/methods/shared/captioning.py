"""What the methods share that write captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline import losses
from pipeline.models.captions import Vocabulary, inside


def told(tokens: Tensor, prefix: Tensor | int = 1) -> Tensor:
    """Bool ``[batch, length - 1]``: for which places the next token is to be told, none of the prefix and no padding."""
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    start = prefix[:, None] if isinstance(prefix, Tensor) else prefix
    return inside(tokens)[:, 1:] & (place >= start)


def written(states: Tensor, tokens: Tensor, wanted: Tensor, vocabulary: Vocabulary, rows: int) -> Tensor:
    """Sum over the wanted places of the next token's ``-log p``; of what only stands for numbers, over all places."""
    choose = (lambda x: x[wanted]) if type(wanted) is Tensor else (lambda x: x.flatten(0, 1))
    chosen, targets = choose(states[:, :-1]), choose(tokens[:, 1:])
    total: Tensor = vocabulary(chosen, lambda x, matrix: losses.token_cross_entropy(x, matrix, targets, rows=rows))
    return total


def average_count(wanted: Sequence[Tensor]) -> Tensor:
    """Tokens to be told in an average micro-batch of the step: over all ranks, and as many micro-batches as there are.

    What a micro-batch's sum is divided by, so that the mean over micro-batches and ranks is the mean over all tokens: captions of
    different lengths weigh as many tokens as they have, however the batch is cut.
    """
    count = torch.stack([one.sum() for one in wanted]).float().mean()
    return losses.mean_over_ranks(count).clamp(min=1e-6)
