"""Trains linear classifiers with several learning rates at once on frozen features, in one pass over the data.

Features are standardized with the training samples' mean and deviation, so that one grid of learning rates suits all towers.
Gradients are computed explicitly (softmax minus target, times feature) and summed over ranks; the samples of a step depend only
on their positions in the whole list. Results with another number of ranks therefore differ only in the order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.order.random import permutation
from pipeline.evaluation.features import all_reduce_sum

_MOMENTUM = 0.9
_BASE_BATCH = 256
_ORDER = 0x4EAD


@dataclass(frozen=True)
class LinearHeads:
    """Trained classifiers.

    Attributes:
        weight: ``[rates, classes, width]``.
        bias: ``[rates, classes]``.
        mean, scale: ``[width]``, subtracted from the features, and multiplied by.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[rates, n, classes]`` of features ``[n, width]``."""
        x = (x - self.mean) * self.scale
        return torch.einsum("nd,rcd->rnc", x, self.weight) + self.bias[:, None]


def train_heads(
    x: Tensor,
    targets: Tensor,
    positions: Tensor,
    *,
    order: Tensor,
    rates: Sequence[float],
    epochs: int,
    batch: int,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> LinearHeads:
    """SGD with momentum and a cosine schedule to zero, without weight decay, from zero weights.

    Args:
        x: this rank's features ``[n, tokens, width]`` (one token for image classification, all patches for dense tasks).
        targets: ``[n, tokens, classes]`` shares of the classes; a token with zero shares is ignored.
        positions: int64 ``[n]``, the samples' positions in the whole list.
        order: int64, the positions of all training samples of all ranks, ascending.
        rates: learning rates for a batch of 256, one classifier each.
        epochs: passes over the samples.
        batch: samples per step over all ranks.
        seed: of the order.
        group: process group for sums over ranks of host tensors.
        device: where steps are computed; features and results stay on the host.
    """
    width, classes = x.shape[2], targets.shape[2]
    mean, scale = _moments(x, group)
    device_mean, device_scale = mean.to(device), scale.to(device)
    weight = torch.zeros(len(rates), classes, width, device=device)
    bias = torch.zeros(len(rates), classes, device=device)
    velocity = torch.zeros(len(rates), classes, width + 1, device=device)
    batch = max(1, min(batch, len(order)))
    steps = epochs * math.ceil(len(order) / batch)
    row_of = torch.full((int(order.max()) + 1 if len(order) else 1,), -1, dtype=torch.int64)
    row_of[positions] = torch.arange(len(positions))
    peaks = torch.tensor(list(rates), device=device) * batch / _BASE_BATCH
    done = 0
    for epoch in range(epochs):
        shuffled = order[torch.from_numpy(permutation(len(order), seed, _ORDER + epoch).astype("int64"))]
        for low in range(0, len(order), batch):
            rows = row_of[shuffled[low : low + batch]]
            rows = rows[rows >= 0]
            features, shares = x[rows].flatten(0, 1).to(device), targets[rows].flatten(0, 1).to(device).float()
            features = (features.float() - device_mean) * device_scale
            labelled = shares.sum(1) > 0
            features, shares = features[labelled], shares[labelled]
            logits = torch.einsum("nd,rcd->rnc", features, weight) + bias[:, None]
            error = (logits.softmax(-1) * shares.sum(1)[None, :, None] - shares).transpose(1, 2)
            gradient = torch.cat([error @ features, error.sum(2, keepdim=True)], dim=2)
            flat = all_reduce_sum(torch.cat([gradient.flatten(), shares.sum().reshape(1)]).double().cpu(), group)
            gradient = (flat[:-1] / flat[-1].clamp_min(1.0)).float().view_as(velocity).to(device)
            velocity = _MOMENTUM * velocity + gradient
            rate = peaks * (0.5 * (1 + math.cos(math.pi * done / steps)))
            weight -= rate[:, None, None] * velocity[..., :-1]
            bias -= rate[:, None] * velocity[..., -1]
            done += 1
    return LinearHeads(weight.cpu(), bias.cpu(), mean, scale)


def _moments(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of each channel over all ranks."""
    flat = x.double().flatten(0, 1)
    sums = torch.cat([flat.sum(0), flat.square().sum(0), flat.new_tensor([float(len(flat))])])
    all_reduce_sum(sums, group)
    total, squares, count = sums[: x.shape[2]], sums[x.shape[2] : -1], sums[-1].clamp_min(1.0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0.0).sqrt()
    return mean.float(), (1.0 / deviation.clamp_min(1e-6)).float()


def held_out_mask(total: int, share: float, seed: int = 0) -> Tensor:
    """Positions held out for validation, bool ``[total]``: the given share, at least one, never all."""
    count = min(max(round(total * share), 1), total - 1)
    mask = torch.zeros(total, dtype=torch.bool)
    mask[torch.from_numpy(permutation(total, seed, 0x8E1D)[:count].astype("int64"))] = True
    return mask


def gather_positions(positions: Tensor, total: int, group: dist.ProcessGroup | None) -> Tensor:
    """The positions of all ranks, ascending, out of ``total``."""
    present = torch.zeros(total, dtype=torch.int64)
    present[positions] = 1
    return all_reduce_sum(present, group).nonzero().squeeze(1)
