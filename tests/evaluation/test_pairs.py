"""Zero-shot classification and retrieval: hand-computed answers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.evaluation.retrieval import retrieval_scores
from pipeline.evaluation.zeroshot import SIMPLE, class_vectors, classification_scores, read_lines

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


def test_the_defaults_are_the_protocols() -> None:
    images, texts, owners = torch.eye(12), torch.eye(12).repeat(2, 1), torch.arange(12).repeat(2)
    scores = retrieval_scores(images, texts, torch.arange(12), owners)
    recalls = {f"{way}/recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert set(scores) == recalls | {
        f"{way}/{rank}_rank" for way in ("image_to_text", "text_to_image") for rank in ("mean", "median")
    }
    assert set(scores.values()) == {1.0}
    labels = torch.arange(7)
    shown = classification_scores(torch.eye(7).roll(1, 0) + 0.5 * torch.eye(7), torch.eye(7), labels)
    assert shown == {"top1": 0.0, "top5": 1.0, "mean_per_class": 0.0}


def test_ranks_lie_between_recalls() -> None:
    """The correct answer of the n-th query is the n-th nearest."""
    answers = torch.eye(5)
    queries = torch.stack([torch.tensor([1.0 / (1 + abs(j - 0.1)) for j in range(5)])] * 5)
    scores = retrieval_scores(queries, answers, torch.arange(5), torch.arange(5), ks=(2, 5), chunk=2)
    assert scores["image_to_text/mean_rank"] == scores["image_to_text/median_rank"] == 3.0
    assert scores["image_to_text/recall@2"] == pytest.approx(0.4)
    skewed = retrieval_scores(queries[:4], answers, torch.tensor([0, 0, 0, 4]), torch.tensor([0, 1, 2, 3, 4]), ks=(1,))
    assert (skewed["image_to_text/mean_rank"], skewed["image_to_text/median_rank"]) == (2.0, 1.0)


def test_features_count_by_their_direction() -> None:
    lengths = torch.tensor([[0.1], [5.0], [2.0], [30.0]], dtype=torch.float64)
    numbers = torch.arange(4)
    plain = retrieval_scores(X, Y, numbers, numbers)
    assert retrieval_scores(X * lengths, Y * lengths.flip(0), numbers, numbers) == pytest.approx(plain)
    vectors, labels = torch.nn.functional.normalize(Y.float(), dim=1), torch.tensor([0, 1, 2, 3])
    assert classification_scores(X * lengths, vectors, labels) == classification_scores(X, vectors, labels)


def test_every_text_is_encoded_once_in_the_order_of_classes_and_templates() -> None:
    seen: list[list[str]] = []

    def encode(texts: list[str]) -> Tensor:
        seen.append(texts)
        return torch.eye(len(texts), 400)

    vectors = class_vectors(encode, [str(number) for number in range(150)], ["a {}", "{} b"])
    assert vectors.shape == (150, 400) and vectors.dtype == torch.float32
    assert [len(texts) for texts in seen] == [256, 44]
    assert [*seen[0], *seen[1]][:4] == ["a 0", "0 b", "a 1", "1 b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must not be empty"),
        (b" \n\n", "must not be empty"),
        (b"a {}\nb\n", "must contain {}, and 'b'"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_file_of_lines_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_lines(file, what="prompt templates", placeholder="{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lines(tmp_path / "absent", what="class names")
    file.write_text(" one \n\n two three\n", encoding="utf-8")
    assert read_lines(file, what="class names") == ["one", "two three"]
