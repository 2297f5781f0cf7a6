"""Losses between views of images: InfoNCE as in SimCLR and MoCo, BYOL's regression, LoGo's repulsion.

All normalize their inputs, in fp32 or wider. Each is a mean over this rank's rows, and its mean over ranks is the loss of the
global batch. Gradients flow into other ranks' rows in SimCLR; in MoCo these are the teacher's and get none.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses.contrastive import gathered, rank_offset


def info_nce(query: Tensor, keys: Tensor, positive: Tensor, temperature: float, *, drop: Tensor | None = None) -> Tensor:
    """``mean_i -log softmax_j(query_i . keys_j / temperature)[positive_i]``; ``ln(number of keys)`` for random features.

    Args:
        query: ``[n, d]``.
        keys: ``[m, d]``.
        positive: int64 ``[n]``, index of each query's positive key.
        temperature: divides the cosines.
        drop: int64 ``[n]``, index of one key per query to exclude, such as the query itself.
    """
    query, keys = _unit(query), _unit(keys)
    with torch.autocast(query.device.type, enabled=False):
        logits = query @ keys.T / temperature
        if drop is not None:
            logits = logits.scatter(1, drop[:, None], float("-inf"))
        return F.cross_entropy(logits, positive)


def nt_xent(first: Tensor, second: Tensor, temperature: float, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """SimCLR's NT-Xent loss (arXiv 2002.05709): each view against all views of the global batch.

    The positive is the image's other view. The mean over the views; the authors' code sums the two halves and so has twice
    this value.

    Args:
        first, second: ``[b, d]``, the two views of this rank's images; the same number on every rank.
        temperature: divides the cosines.
        group: ranks that share the batch.
    """
    views, rows = torch.cat([_unit(first), _unit(second)]), len(first)
    keys = torch.cat([gathered(view, group) for view in views.split(rows)])
    own = rank_offset(rows, group) + torch.arange(rows, device=views.device)
    other = own + len(keys) // 2
    return info_nce(views, keys, torch.cat([other, own]), temperature, drop=torch.cat([own, other]))


def momentum_contrast(query: Tensor, keys: Tensor, first: int, temperature: float) -> Tensor:
    """MoCo v3's loss of one direction (arXiv 2104.02057): InfoNCE times ``2 * temperature``.

    Args:
        query: ``[b, d]``, the student's.
        keys: ``[B, d]``, the teacher's of the whole batch.
        first: index of the first query's key; the other queries' keys follow.
        temperature: divides the cosines.
    """
    positive = torch.arange(first, first + len(query), device=query.device)
    return 2 * temperature * info_nce(query, keys.detach(), positive, temperature)


def queue_contrast(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's loss (arXiv 1911.05722): each query against its own key and the queue of earlier keys.

    Args:
        query, key: ``[b, d]``, the student's and the teacher's.
        queue: ``[K, d]``, keys of earlier images.
        temperature: divides the cosines.
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
    """LoGo's regressor loss: binary cross-entropy of "same image" logits for pairs of one image and pairs of two images."""
    return F.softplus(-same.float()).mean() + F.softplus(different.float()).mean()


def repulsion(same: Tensor) -> Tensor:
    """LoGo's encoder loss: crops of one image should look to the regressor like crops of two images."""
    return F.softplus(same.float()).mean()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=1e-12)
