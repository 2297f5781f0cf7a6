"""Weighted k-nearest-neighbour classification on frozen features (Wu et al., arXiv 1805.01978; protocol of DINO and DINOv2).

Features are L2-normalised; each of the ``k`` nearest training samples votes for its class with weight
``softmax(similarity / temperature)`` taken over the largest ``k`` in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_votes(
    similarities: Tensor, labels: Tensor, *, classes: int, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Class scores from the nearest neighbours.

    Args:
        similarities: ``[queries, max(ks)]``, cosine similarities in descending order.
        labels: int64 ``[queries, max(ks)]``, the neighbours' classes.
        classes: number of classes.
        ks: numbers of neighbours.
        temperature: of the softmax over neighbours.

    Returns:
        For each k, scores ``[queries, classes]``.
    """
    weights = (similarities / temperature).softmax(dim=1)
    scores = {}
    for k in ks:
        one_hot = torch.zeros(len(labels), classes, dtype=weights.dtype, device=weights.device)
        scores[k] = one_hot.scatter_add_(1, labels[:, :k], weights[:, :k])
    return scores


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    chunk: int = 512,
) -> dict[int, float]:
    """Top-1 accuracy of weighted k-NN classification.

    Args:
        queries: ``[q, d]`` features to classify.
        query_labels: int64 ``[q]``.
        bank: ``[n, d]`` features of the training samples.
        bank_labels: int64 ``[n]``.
        ks: numbers of neighbours; clipped to ``n``.
        temperature: of the softmax over neighbours.
        chunk: queries compared at a time.

    Returns:
        Accuracy in 0..1 for each k.
    """
    if not len(queries) or not len(bank):
        return dict.fromkeys(ks, float("nan"))
    # The features of an untrained network differ only in the last bits of fp32, where the order of the bank would decide.
    queries, bank = F.normalize(queries.double(), dim=1), F.normalize(bank.double(), dim=1)
    classes = int(max(query_labels.max(), bank_labels.max())) + 1
    most = min(max(ks), len(bank))
    right = dict.fromkeys(ks, 0)
    for low in range(0, len(queries), chunk):
        nearest, index = (queries[low : low + chunk] @ bank.T).topk(most, dim=1)
        scores = knn_votes(nearest, bank_labels[index], classes=classes, ks=[min(k, most) for k in ks], temperature=temperature)
        for k in ks:
            right[k] += int((scores[min(k, most)].argmax(dim=1) == query_labels[low : low + chunk]).sum())
    return {k: n / len(queries) for k, n in right.items()}
