"""Dependence of features on a column of metadata, from running sums, so that it needs no batch of all values.

The measure is the correlation ratio of features :math:`f` on the unit sphere: variance between the values' means over total
variance,

.. math:: \\eta^2 = \\frac{\\sum_g p_g \\|m_g - m\\|^2}{1 - \\|m\\|^2}

from 0 (equal means) to 1, with a value's share :math:`p_g`, its mean :math:`m_g` and the overall mean :math:`m`. It is the
squared norm of the cross-covariance between features and the column's one-hot coding, weighted by shares and normalized: HSIC
with a linear kernel (Gretton et al., ALT 2005; as a loss: Greenfeld and Shalit, arXiv 1910.00270). Means over a batch are too
noisy for a gradient where it holds few samples of a value (the reason of Vento et al., arXiv 2207.07271, for statistics that
outlive the batch), so means and shares are those of running sums.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 1e-4  # total variance, below which features have collapsed


def value_sums(features: Tensor, numbers: Tensor, values: int) -> Tensor:
    """Number of samples and sum of features of each value, fp32 (fp64 if the features are) ``[values, 1 + width]``.

    Args:
        features: ``[n, width]``.
        numbers: int64 ``[n]``, the value of each sample; a negative one takes no part.
        values: number of values.
    """
    of = F.one_hot(numbers.clamp(min=0), values).to(features) * (numbers >= 0)[:, None].to(features)
    return of.T @ torch.cat([torch.ones_like(features[:, :1]), features], dim=1)


def correlation_ratio(sums: Tensor) -> Tensor:
    """:math:`\\eta^2` of features of norm 1, scalar; 0 where no value occurs.

    Args:
        sums: ``[values, 1 + width]``, as :func:`value_sums`.
    """
    shares, away, mean = _moments(sums)
    return (shares * away.square().sum(1)).sum() / (1 - mean.square().sum()).clamp(min=_LEAST)


def dependence(features: Tensor, numbers: Tensor, sums: Tensor) -> Tensor:
    """:math:`\\eta^2`, to first order about some sums, of the samples of a batch; scalar.

    Value and gradient are a mean over samples: they are the same however a batch is divided. Where the sums are those of the
    batch, the value is :math:`\\eta^2` and the gradient is its gradient.

    Args:
        features: ``[n, width]`` of norm 1.
        numbers: int64 ``[n]``, the value of each sample; a negative one counts as 0.
        sums: ``[values, 1 + width]``, as :func:`value_sums`, without gradient; a value that does not occur there counts as 0.
    """
    shares, away, mean = _moments(sums)
    total = (1 - mean.square().sum()).clamp(min=_LEAST)
    ratio = (shares * away.square().sum(1)).sum() / total
    gradient = 2 * (away + ratio * mean) / total  # [values, width]: gradient with respect to each mean, over its share
    known = (numbers >= 0) & (shares > 0)[numbers.clamp(min=0)]
    own = numbers.clamp(min=0)
    terms = ratio + (gradient[own] * (features - (away + mean)[own])).sum(1)
    return torch.where(known, terms, terms.new_zeros(())).sum() / max(len(features), 1)


def value_cross_entropy(logits: Tensor, numbers: Tensor) -> Tensor:
    """Cross entropy of predicted values in units of a uniform guess (``ln values``): 1 for a guess, 0 for certainty; fp32 scalar.

    A mean over all samples, to which those without a value add 0, so that it is the same however a batch is divided.

    Args:
        logits: ``[n, values]``.
        numbers: int64 ``[n]``, the value of each sample; a negative one takes no part.
    """
    terms = F.cross_entropy(logits.float(), numbers.clamp(min=0), reduction="none")
    return torch.where(numbers >= 0, terms, terms.new_zeros(())).sum() / (max(len(logits), 1) * math.log(logits.shape[1]))


def _moments(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares ``[values]``, distances of the means from the overall mean ``[values, width]`` (0 for a value that does not occur)
    and that mean ``[width]``.
    """
    counts = sums[:, 0].clamp(min=0)
    everything = counts.sum().clamp(min=1e-9)
    mean = (sums[:, 1:] * (counts > 0)[:, None]).sum(0) / everything
    away = torch.where((counts > 0)[:, None], sums[:, 1:] / counts.clamp(min=1e-9)[:, None] - mean, torch.zeros_like(mean))
    return counts / everything, away, mean
