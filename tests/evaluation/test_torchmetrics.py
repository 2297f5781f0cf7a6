"""Our metrics against torchmetrics' of the same meaning, an implementation that shares nothing with ours."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pipeline.evaluation.retrieval import retrieval_scores
from pipeline.evaluation.segmentation import IGNORED, confusion, ious, mean_iou
from pipeline.evaluation.zeroshot import classification_scores

pytestmark = pytest.mark.slow  # importing torchmetrics brings transformers and matplotlib
CLASSES = 7


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_confusion_and_intersection_over_union_are_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

    g = generator()
    target, predicted = (torch.randint(0, CLASSES, (3, 20, 30), generator=g) for _ in range(2))
    target[:, :4] = IGNORED
    ours = confusion(predicted, target, CLASSES)
    known: dict[str, int] = {"num_classes": CLASSES, "ignore_index": IGNORED}
    assert torch.equal(ours, multiclass_confusion_matrix(predicted, target, **known))
    torch.testing.assert_close(ious(ours).float(), multiclass_jaccard_index(predicted, target, average="none", **known))
    assert mean_iou(ours) == pytest.approx(float(multiclass_jaccard_index(predicted, target, average="macro", **known)))


def test_a_class_that_is_nowhere_counts_for_nothing_as_in_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    target, predicted = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 0])
    theirs = float(multiclass_jaccard_index(predicted, target, num_classes=3, average="macro"))
    assert mean_iou(confusion(predicted, target, 3)) == pytest.approx(theirs)


def test_accuracies_are_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy

    g = generator()
    features, vectors = torch.randn(200, 8, generator=g), F.normalize(torch.randn(CLASSES, 8, generator=g), dim=1)
    labels = torch.arange(200) ** 2 % CLASSES
    labels[:CLASSES] = torch.arange(CLASSES)
    similarity = F.normalize(features, dim=1) @ vectors.T
    scores = classification_scores(features, vectors, labels, ks=(1, 3))
    for k in (1, 3):
        theirs = multiclass_accuracy(similarity, labels, num_classes=CLASSES, top_k=k, average="micro")
        assert scores[f"top{k}"] == pytest.approx(float(theirs))
    theirs = multiclass_accuracy(similarity, labels, num_classes=CLASSES, average="macro")
    assert scores["mean_per_class"] == pytest.approx(float(theirs))


def test_recalls_are_torchmetrics_hit_rates() -> None:
    from torchmetrics.functional.retrieval import retrieval_hit_rate

    g = generator()
    images, texts = torch.randn(20, 6, generator=g), torch.randn(60, 6, generator=g)
    owners = torch.arange(60) % 20  # three captions each
    scores = retrieval_scores(images, texts, torch.arange(20), owners)
    similarity = F.normalize(images.double(), dim=1) @ F.normalize(texts.double(), dim=1).T
    right = torch.arange(20)[:, None] == owners[None]
    for k in (1, 5, 10):
        for name, table, hits in (("image_to_text", similarity, right), ("text_to_image", similarity.T, right.T)):
            theirs = [float(retrieval_hit_rate(row, hit, top_k=k)) for row, hit in zip(table, hits, strict=True)]
            assert scores[f"{name}/recall@{k}"] == pytest.approx(sum(theirs) / len(theirs)), (name, k)
