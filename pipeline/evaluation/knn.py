"""Weighted k-nearest-neighbour classification on frozen features (Wu et al., arXiv 1805.01978; protocol of DINO and DINOv2).

Features are L2-normalised; each of the ``k`` nearest training samples votes for its class with weight
``softmax(similarity / temperature)`` taken over the largest ``k`` in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import DataError
from pipeline.evaluation.base import Evaluator
from pipeline.evaluation.features import all_gather, extract
from pipeline.evaluation.images import raw_pixels
from pipeline.evaluation.settings import KnnSettings
from pipeline.models.eval_model import EvalModel


def knn_votes(
    similarities: Tensor, labels: Tensor, *, classes: int, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Class scores of weighted k-NN: softmax-weighted votes of the nearest neighbours.

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
        Accuracy in 0..1 for each k; NaN if there are no queries or the bank is empty.
    """
    if not len(queries) or not len(bank):
        return dict.fromkeys(ks, float("nan"))
    # The features of an untrained network differ only in the last bits of fp32, where the order of the bank would decide.
    queries, bank = F.normalize(queries.double(), dim=1), F.normalize(bank.double(), dim=1)
    classes = int(max(query_labels.max(), bank_labels.max())) + 1
    max_k = min(max(ks), len(bank))
    clipped = [min(k, max_k) for k in ks]
    correct = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), chunk):
        similarities, neighbours = (queries[start : start + chunk] @ bank.T).topk(max_k, dim=1)
        scores = knn_votes(similarities, bank_labels[neighbours], classes=classes, ks=clipped, temperature=temperature)
        for k in ks:
            correct[k] += int((scores[min(k, max_k)].argmax(dim=1) == query_labels[start : start + chunk]).sum())
    return {k: count / len(queries) for k, count in correct.items()}


class Knn(Evaluator[KnnSettings]):
    """k-NN accuracy; the feature bank is gathered from all ranks, the queries are divided among them."""

    def __call__(self, model: EvalModel) -> dict[str, float]:
        """``k<k>`` for each k, with the class tokens as features.

        Raises:
            DataError: on all ranks, if no sample of the bank or of the queries has a label.
        """
        return self._scores(model.cls)

    def raw_pixel_scores(self) -> dict[str, float]:
        """k-NN accuracy with raw pixels as features, a baseline."""
        return self._scores(raw_pixels)

    def _scores(self, features: Callable[[Tensor], Tensor]) -> dict[str, float]:
        return {f"k{k}": value for k, value in self.accuracy(features).items()}

    def accuracy(self, features: Callable[[Tensor], Tensor]) -> dict[int, float]:
        """k-NN accuracy in 0..1 for each k, with any function of the images as features; the same on all ranks.

        Args:
            features: maps ``[n, 3, h, w]`` to ``[n, d]``.

        Raises:
            DataError: on all ranks, if no sample of the bank or of the queries has a label.
        """
        ks, group = self.settings.k, self.data.group
        own_bank = extract(self.data.bank, features)
        per_rank = all_gather((own_bank.values, own_bank.labels), group)
        bank, bank_labels = (torch.cat([part[i] for part in per_rank]) for i in (0, 1))
        queries = extract(self.data.queries, features)
        # A single rank may have no query; an error is raised only if there is none on any rank, and then on all ranks.
        counts = torch.zeros(len(ks) + 1, dtype=torch.int64)
        if len(bank) and len(queries):
            fractions = knn_accuracy(
                queries.values, queries.labels, bank, bank_labels, ks=ks, temperature=self.settings.temperature
            )
            counts = torch.tensor([*(round(fractions[k] * len(queries)) for k in ks), len(queries)])
        dist.all_reduce(counts, group=group)
        *correct, total = counts.tolist()
        if not total:
            raise DataError(
                "the evaluation shards have no labelled sample", where="evaluation.knn", hint="Give shards with .cls members"
            )
        return {k: correct[i] / total for i, k in enumerate(ks)}
