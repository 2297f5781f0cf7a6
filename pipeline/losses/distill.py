"""Self-distillation losses: cross-entropy with a teacher's targets, over crops (DINO) and masked patches (iBOT).

These are the plain formulas; training uses :mod:`pipeline.losses.prototypes`, which never holds all logits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(student_logits: Tensor, targets: Tensor, student_temperature: float = 0.1) -> Tensor:
    """``-sum_k targets * log_softmax(student_logits / temperature)`` of each row, fp32.

    Args:
        student_logits: ``[..., K]``, any float dtype.
        targets: ``[..., K]``, broadcastable; rows need not sum to 1, so targets of several views can be summed first.
        student_temperature: the student's temperature.

    Returns:
        ``[...]``.
    """
    log_p = torch.log_softmax(student_logits.float() / student_temperature, dim=-1)
    return -(targets.float() * log_p).sum(-1)


def multi_crop(
    student_global: Tensor, student_local: Tensor, targets: Tensor, student_temperature: float = 0.1
) -> tuple[Tensor, Tensor]:
    """DINO's loss over crops: each student crop against the targets of every *other* global crop.

    Two global and L local crops make ``n = 2 + 2 L`` pairs, each with weight ``1 / n``.

    Args:
        student_global: logits ``[2, batch, K]`` of the student's global crops.
        student_local: logits ``[L, batch, K]`` of its local crops; L may be 0.
        targets: ``[2, batch, K]`` for the global crops.
        student_temperature: the student's temperature.

    Returns:
        The local and the global part; their sum is the loss.
    """
    pairs = 2 + 2 * len(student_local)
    local_part = cross_entropy(student_local, targets.sum(0), student_temperature).mean(-1).sum() / pairs
    global_part = cross_entropy(student_global, targets.flip(0), student_temperature).mean(-1).sum() / pairs
    return local_part, global_part


def masked_patches(
    student_logits: Tensor, targets: Tensor, weight: Tensor, crops: int, student_temperature: float = 0.1
) -> Tensor:
    """iBOT's loss: mean over the masked patches of a crop, then over *all* crops, including those without a mask.

    Args:
        student_logits: ``[masked, K]``; ``masked`` may be 0.
        targets: ``[masked, K]``, same patches of the same crops.
        weight: ``[masked]``, one over the number of masked patches of the patch's crop.
        crops: number of global crops in the batch.
        student_temperature: the student's temperature.
    """
    return (cross_entropy(student_logits, targets, student_temperature) * weight.float()).sum() / crops
