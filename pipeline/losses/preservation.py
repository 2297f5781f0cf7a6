"""Keeps the features of a network that is trained on close to those it began with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_distance(student: Tensor, start: Tensor) -> Tensor:
    """Mean of one minus the cosine between features, fp32 scalar from 0 to 2: feature distillation from the frozen start, as in
    learning without forgetting (Li and Hoiem, arXiv 1606.09282), without labels.

    Args:
        student: ``[batch, width]``.
        start: the same images by the frozen network, ``[batch, width]``; gets no gradient.
    """
    with torch.autocast(student.device.type, enabled=False):
        return (1.0 - F.cosine_similarity(student.float(), start.detach().float(), dim=-1)).mean()
