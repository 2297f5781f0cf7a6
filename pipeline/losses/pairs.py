"""Losses between views of pictures: InfoNCE in the forms of SimCLR and MoCo, BYOL's regression, LoGo's repulsion.

All normalise their inputs, in fp32 or wider. Each is a mean over this rank's rows whose mean over the ranks is the loss of the
global batch; where others' rows are compared with, gradients flow into them if the method wants that (SimCLR) and do not if they
are a teacher's (MoCo).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses.contrastive import gathered, place


def info_nce(query: Tensor, keys: Tensor, positive: Tensor, temperature: float, *, drop: Tensor | None = None) -> Tensor:
    """``mean_i -log softmax_j(query_i . keys_j / temperature)[positive_i]``; ``ln(number of keys)`` at random.

    Args:
        query: ``[n, d]``.
        keys: ``[m, d]``.
        positive: int64 ``[n]``, the key that belongs to each query.
        temperature: what cosines are divided by.
        drop: int64 ``[n]``, one key of each query that is not compared, such as the query itself.
    """
    query, keys = _unit(query), _unit(keys)
    with torch.autocast(query.device.type, enabled=False):
        logits = query @ keys.T / temperature
        if drop is not None:
            logits = logits.scatter(1, drop[:, None], float("-inf"))
        return F.cross_entropy(logits, positive)


def nt_xent(first: Tensor, second: Tensor, temperature: float, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """SimCLR's loss (arXiv 2002.05709): each view finds its picture's other view among all views of the global batch.

    The mean over the views; the authors' code adds up the two halves and so has twice this.

    Args:
        first, second: ``[b, d]``, the two views of this rank's pictures; every rank as many.
        temperature: what cosines are divided by.
        group: ranks that share the batch.
    """
    views, rows = torch.cat([_unit(first), _unit(second)]), len(first)
    keys = torch.cat([gathered(view, group) for view in views.split(rows)])
    own = place(rows, group) + torch.arange(rows, device=views.device)
    other = own + len(keys) // 2
    return info_nce(views, keys, torch.cat([other, own]), temperature, drop=torch.cat([own, other]))


def momentum_contrast(query: Tensor, keys: Tensor, first: int, temperature: float) -> Tensor:
    """MoCo v3's loss of one direction (arXiv 2104.02057): InfoNCE times ``2 * temperature``.

    Args:
        query: ``[b, d]``, the student's.
        keys: ``[B, d]``, the teacher's of the whole batch.
        first: the key of the first query; the others follow.
        temperature: what cosines are divided by.
    """
    positive = torch.arange(first, first + len(query), device=query.device)
    return 2 * temperature * info_nce(query, keys.detach(), positive, temperature)


def queue_contrast(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's loss (arXiv 1911.05722): each query finds its own key among it and those of earlier batches.

    Args:
        query, key: ``[b, d]``, the student's and the teacher's.
        queue: ``[K, d]``, keys of earlier pictures.
        temperature: what cosines are divided by.
    """
    query, key, queue = _unit(query), _unit(key.detach()), _unit(queue)
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / temperature
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))


def cosine_regression(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL's loss of one direction (arXiv 2006.07733): ``mean |unit prediction - unit target|^2``, which is ``2 - 2 cos``."""
    with torch.autocast(prediction.device.type, enabled=False):
        return (_unit(prediction) - _unit(target.detach())).square().sum(1).mean()


def same_or_not(same: Tensor, different: Tensor) -> Tensor:
    """LoGo's regressor: logits of "one picture" for pairs that are of one picture and for pairs that are not."""
    return F.softplus(-same.float()).mean() + F.softplus(different.float()).mean()


def repulsion(same: Tensor) -> Tensor:
    """LoGo's term for the encoder: crops of one picture should look to the regressor like those of two."""
    return F.softplus(same.float()).mean()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=1e-12)
