"""Zero-shot classification and retrieval: hand-computed answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.evaluation.retrieval import retrieval_scores
from pipeline.evaluation.zeroshot import SIMPLE, class_vectors, classification_scores

K = torch.arange(1, 33, dtype=torch.float64)
X, Y = torch.sin(K).view(4, 8), torch.cos(0.5 * K).view(4, 8)


def test_one_caption_each_gives_the_reference() -> None:
    scores = retrieval_scores(X, Y, torch.arange(4), torch.arange(4), ks=(1, 4))
    assert scores["image_to_text/recall@1"] == 0.5
    assert scores["text_to_image/recall@1"] == 0.25
    assert scores["image_to_text/mean_rank"] == scores["text_to_image/mean_rank"] == 2.0
    assert scores["image_to_text/recall@4"] == scores["text_to_image/recall@4"] == 1.0


def test_several_captions_of_an_image_count_as_one_answer() -> None:
    scores = retrieval_scores(X[:2], Y, torch.arange(2), torch.tensor([0, 0, 1, 1]), ks=(1,))
    assert scores["text_to_image/recall@1"] == 0.5
    assert scores["image_to_text/recall@1"] == 1.0


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_nothing(chunk: int) -> None:
    numbers = torch.arange(4)
    assert retrieval_scores(X, Y, numbers, numbers, chunk=chunk) == retrieval_scores(X, Y, numbers, numbers)


def test_a_network_that_tells_nothing_apart_finds_nothing() -> None:
    scores = retrieval_scores(torch.ones(20, 3), torch.ones(20, 3), torch.arange(20), torch.arange(20), ks=(1, 10))
    assert all(scores[name] == 0.0 for name in scores if "recall" in name)


def test_images_with_equal_captions_are_each_a_correct_answer() -> None:
    images, texts = torch.eye(3)[[0, 0, 1]], torch.eye(3)[[0, 0, 1]]
    numbers = torch.tensor([7, 7, 8])
    assert retrieval_scores(images, texts, numbers, numbers, ks=(1,))["text_to_image/recall@1"] == 1.0
    own = retrieval_scores(images, texts, torch.arange(3), torch.arange(3), ks=(1,))
    assert own["text_to_image/recall@1"] == pytest.approx(1 / 3)


def _encode(texts: list[str]) -> Tensor:
    """The first axis for cats, the second for dogs, and in a video game three of the third, which is common to both."""
    rows = []
    for text in texts:
        game = 3.0 if "game" in text else 0.0
        rows.append([float("cat" in text) + 0.0, float("dog" in text), game])
    return torch.tensor(rows)


def test_a_class_is_the_unit_mean_of_unit_sentences() -> None:
    vectors = class_vectors(_encode, ["cat", "dog"], ["a {}", "a {} game"], batch=3)
    both = torch.tensor([1.0 + 1 / math.sqrt(10), 0.0, 3 / math.sqrt(10)])
    torch.testing.assert_close(vectors[0], both / both.norm())
    assert vectors[1, 0] == 0.0
    assert len(SIMPLE) == 7
    assert all(template.count("{}") == 1 for template in SIMPLE)


def test_top_k_and_the_mean_over_classes() -> None:
    vectors = torch.eye(3)
    features = torch.tensor([[3.0, 2.0, 0.0], [2.0, 3.0, 1.0], [9.0, 1.0, 0.5], [0.0, 1.0, 5.0]])
    labels = torch.tensor([0, 0, 0, 2])
    scores = classification_scores(features, vectors, labels, ks=(1, 2))
    assert scores["top1"] == 0.75
    assert scores["top2"] == 1.0
    assert scores["mean_per_class"] == pytest.approx((2 / 3 + 1) / 2)
