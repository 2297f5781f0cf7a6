"""Evaluators on shards: hand-computed answers, scikit-learn's, and one rank's equal to two ranks'."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.augment.views import IMAGENET_MEAN, IMAGENET_STD
from pipeline.data.index.build import build
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.reader import Reader
from pipeline.data.pack import synthetic as scenes
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.base import evaluate_all, evaluator_class
from pipeline.evaluation.features import all_gather_table, extract
from pipeline.evaluation.images import EvalData, ImageSet
from pipeline.evaluation.linear_heads import held_out_mask, train_heads
from pipeline.evaluation.logistic import fit
from pipeline.evaluation.retrieval import Retrieval, match_captions
from pipeline.evaluation.robustness import Fooling, Robustness, fooling
from pipeline.evaluation.segmentation import IGNORED, class_map, confusion, ious, mean_iou
from pipeline.evaluation.settings import (
    EvaluationSettings,
    KnnSettings,
    LinearSettings,
    LogisticSettings,
    RetrievalSettings,
    RobustnessSettings,
    SegmentationSettings,
    ZeroShotSettings,
)
from pipeline.evaluation.zeroshot import ZeroShot
from pipeline.models.eval_model import EvalModel, preserve_rng_and_mode
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.evaluation import eval_data, image_set
from tests.helpers.rank_pool import pool

CPU = torch.device("cpu")
CLASSES = 3


# ---- by hand ----------------------------------------------------------------------------------------------------------------


def test_intersection_over_union_by_hand() -> None:
    target = torch.tensor([[0, 0, 1, 1], [2, 2, IGNORED, IGNORED]])
    predicted = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 1]])
    matrix = confusion(predicted, target, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert ious(matrix)[:3].tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 2])
    assert math.isnan(float(ious(matrix)[3]))  # the fourth class is nowhere: it counts for nothing
    assert mean_iou(matrix) == pytest.approx(0.5)


def test_intersection_over_union_is_scikit_learns() -> None:
    from sklearn.metrics import confusion_matrix, jaccard_score

    generator = torch.Generator().manual_seed(0)
    target, predicted = (torch.randint(0, 5, (400,), generator=generator) for _ in range(2))
    target[:50] = IGNORED
    matrix = confusion(predicted, target, 5)
    assert np.array_equal(matrix.numpy(), confusion_matrix(target[50:], predicted[50:]))
    assert mean_iou(matrix) == pytest.approx(jaccard_score(target[50:], predicted[50:], average="macro"))


def test_fooling_compares_with_the_clean_answer_and_not_with_the_label() -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    clean = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    disturbed = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    assert fooling(clean, disturbed, labels) == Fooling(0.5, 0.75, 0.25, pytest.approx(2 / 3))


def test_images_that_share_a_caption_belong_together() -> None:
    images, owners, texts = match_captions([("a", "b"), ("c",), ("b",)], merge=True)
    assert images[0] == images[2] != images[1]
    assert owners.tolist() == [images[0], images[0], images[1], images[2]]
    assert texts == ["a", "b", "c", "b"]


def test_images_over_a_chain_of_shared_captions_belong_together() -> None:
    images, owners, _ = match_captions([("a",), ("b",), ("d",), ("a", "b")], merge=True)
    assert images[0] == images[1] == images[3] != images[2]
    assert owners.tolist() == [images[0], images[1], images[2], images[3], images[3]]


def test_by_default_an_image_answers_for_its_own_captions_only() -> None:
    images, owners, _ = match_captions([("a", "b"), ("c",), ("b",)], merge=False)
    assert images.tolist() == [0, 1, 2] and owners.tolist() == [0, 0, 1, 2]
    assert not RetrievalSettings().merge_equal_captions


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_class_map_is_cropped_like_its_image() -> None:
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, 2:4], pixels[:, 4:6], pixels[0, 2] = 1, 2, 9
    result = class_map(png(pixels), size=4, classes=3, ignore=(9,), key="k")
    assert result.tolist() == [[IGNORED, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2]]
    assert class_map(png(pixels), size=2, classes=3, ignore=(9,), key="k").tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(np.full((4, 4), 7, dtype=np.uint8)), r"must be 0 to 2, and it holds \[7\]"),
        (png(np.zeros((4, 4, 3), dtype=np.uint8)), "not of mode RGB"),
        (b"no image", "cannot be read"),
    ],
)
def test_a_class_map_without_class_numbers_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_map(data, size=4, classes=3, ignore=(), key="k")


# ---- on shards --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """36 images to learn from and 14 to evaluate: class c is a bar of its colour in its third, maps say where."""
    folder = tmp_path_factory.mktemp("bars")
    made = []
    for name, first, count in (("train", 0, 36), ("test", 100, 14)):
        with ShardWriter(folder, name, samples_per_shard=20) as writer:
            for number in range(first, first + count):
                label = number % CLASSES
                random = np.random.default_rng(number)
                pixels = random.integers(0, 80, (24, 24, 3), dtype=np.uint8)
                classes = np.zeros((24, 24), dtype=np.uint8)
                pixels[8 * label : 8 * label + 8, :, label] += np.uint8(150)
                classes[8 * label : 8 * label + 8] = 1
                classes[0, 0] = 11
                sample: dict[str, Any] = {"__key__": f"{number:04d}", "png": png(pixels), "seg.png": png(classes)}
                if number % 7 != 6:
                    sample["cls"] = str(label)
                sample["txt"] = f"a bar at {label}, number {number}"
                writer.write(sample)
        made.append(build(writer.shards, folder / f"index-{name}"))
    return made[0], made[1]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def images_of(manifest: Manifest) -> ImageSet:
    return image_set(manifest, size=24, batch_size=5)


def data_of(train: Manifest, test: Manifest) -> EvalData:
    return eval_data(size=24, bank=images_of(train), queries=images_of(test), class_maps=(train, test))


def eval_model(texts: bool = False) -> EvalModel:
    torch.manual_seed(3)
    tower = build_tower(ModelSettings(embed_dim=16, depth=2, num_heads=2, patch_size=4, layer_scale=None), image_size=24).eval()

    def sentences(given: list[str]) -> Tensor:
        return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(len(t) + sum(map(ord, t)))) for t in given])

    if not texts:
        return EvalModel(tower, IMAGENET_MEAN, IMAGENET_STD)
    return EvalModel(tower, IMAGENET_MEAN, IMAGENET_STD, images=lambda x: tower(x).cls, texts=sentences)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class names and prompt templates."""
    lists = tmp_path_factory.mktemp("lists")
    (lists / "classes.txt").write_text("one\ntwo\nthree\n")
    (lists / "templates.txt").write_text("a {}\n")
    return lists


def settings(folder: Path) -> EvaluationSettings:
    """Small settings of every evaluator."""
    return EvaluationSettings(
        knn=KnnSettings(k=(1, 5), batch_size=5),
        linear=LinearSettings(learning_rates=(0.1, 1.0), layers=(1, 2), epochs=8, batch_size=8, validation_fraction=0.2),
        logistic=LogisticSettings(C=(0.1, 10.0), validation_fraction=0.2),
        segmentation=SegmentationSettings(
            num_classes=2, ignore_index=(11,), class_names=("dark", "bar"), learning_rates=(0.1, 1.0), epochs=4, batch_size=8
        ),
        zeroshot=ZeroShotSettings(class_names=folder / "classes.txt", templates=folder / "templates.txt"),
        robustness=RobustnessSettings(epochs=1, k=3),
    )


def scores_of(name: str, train: Manifest, test: Manifest, folder: Path) -> dict[str, float]:
    """Scores of an evaluator on this rank, by full name."""
    section, data = settings(folder).section(name), data_of(train, test)
    model = eval_model(texts="text_encoder" in section.needs)
    if isinstance(section, RobustnessSettings):
        return evaluate_all({name: Robustness(section, data, batch=8)}, model)  # type: ignore[dict-item]
    return evaluate_all({name: evaluator_class(name)(section, data)}, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", EvaluationSettings.evaluators())
def test_two_ranks_give_the_scores_of_one(name: str, manifests: tuple[Manifest, Manifest], alone: None, folder: Path) -> None:
    expected = scores_of(name, *manifests, folder)
    ranks = pool(2).run(scores_of, name=name, train=manifests[0], test=manifests[1], folder=folder)
    assert ranks[0] == ranks[1]
    assert ranks[0] == pytest.approx(expected, abs=1e-4)
    assert scores_of(name, *manifests, folder) == expected


@pytest.mark.parametrize("name", EvaluationSettings.evaluators())
def test_an_evaluator_computes_the_metrics_that_its_section_declares(
    name: str, manifests: tuple[Manifest, Manifest], alone: None, folder: Path
) -> None:
    declared = settings(folder).only(name).metrics
    assert set(scores_of(name, *manifests, folder)) == set(declared)
    assert any(metric.higher_is_better for metric in declared.values())


def test_a_probe_learns_what_is_linear(manifests: tuple[Manifest, Manifest], alone: None, folder: Path) -> None:
    assert scores_of("linear", *manifests, folder)["linear/top1"] > 0.9
    scores = scores_of("segmentation", *manifests, folder)
    assert scores["segmentation/miou"] > 0.9 > 0.4 > scores["segmentation/majority"]
    assert scores["segmentation/iou/bar"] > 0.9


def test_logistic_regression_is_scikit_learns(manifests: tuple[Manifest, Manifest], alone: None, folder: Path) -> None:
    from sklearn.linear_model import LogisticRegression as Reference

    model = eval_model()
    tables = [extract(images_of(manifest), model.cls) for manifest in manifests]
    x, y = F.normalize(tables[0].values, dim=1).numpy(), tables[0].labels.numpy()
    assert len(y) == 36 - 5  # those without a class are left out
    scores = scores_of("logistic", *manifests, folder)
    reference = Reference(C=scores["logistic/cost"], max_iter=1000).fit(x, y)
    correct = reference.predict(F.normalize(tables[1].values, dim=1).numpy()) == tables[1].labels.numpy()
    assert scores["logistic/top1"] == pytest.approx(correct.mean())
    held_out = held_out_mask(36, 0.2)[tables[0].positions].numpy()
    classifiers = {C: fit(x[~held_out], y[~held_out], C, 1000) for C in (0.1, 10.0)}
    accuracy = {C: (one.predict(x[held_out]) == y[held_out]).mean() for C, one in classifiers.items()}
    assert scores["logistic/cost"] == max(accuracy, key=lambda C: (accuracy[C], -C))


def test_the_test_split_chooses_nothing(manifests: tuple[Manifest, Manifest], alone: None, folder: Path, tmp_path: Path) -> None:
    """With other labels in the test split the same rate and layers are chosen."""
    with ShardWriter(tmp_path, "other") as writer:
        for number, record in enumerate(Reader(manifests[1]).fetch(manifests[1].ids())):
            writer.write({"__key__": f"{number:04d}", "png": record.image, "cls": str((number * 5 + 1) % 3)})
    other = build(writer.shards, tmp_path / "index")
    first, second = (scores_of("linear", manifests[0], test, folder) for test in (manifests[1], other))
    for key in ("linear/rate", "linear/layers", "linear/patches", "linear/chosen_on"):
        assert first[key] == second[key]
    assert first["linear/top1"] != second["linear/top1"]


def test_heads_are_what_autograd_trains(alone: None) -> None:
    generator = torch.Generator().manual_seed(5)
    x, labels = torch.randn(12, 1, 4, generator=generator), torch.arange(12) % 3
    targets = F.one_hot(labels, 3).unsqueeze(1).float()
    heads = train_heads(x, targets, torch.arange(12), order=torch.arange(12), rates=(0.3,), epochs=4, batch=12)
    flat = (x[:, 0] - x[:, 0].mean(0)) / x[:, 0].std(0, unbiased=False)
    layer = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.3 * 12 / 256 * 0.5 * (1 + math.cos(math.pi * step / 4))
        optimizer.zero_grad()
        F.cross_entropy(layer(flat), labels).backward()
        optimizer.step()
    torch.testing.assert_close(heads.weight[0], layer.weight.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(heads.bias[0], layer.bias.detach(), atol=1e-6, rtol=1e-5)


def test_a_fitted_perturbation_fools_more_than_noise_and_stays_in_its_budget(
    manifests: tuple[Manifest, Manifest], alone: None
) -> None:
    robustness = Robustness(RobustnessSettings(epsilon=20 / 255, epochs=4, k=3), data_of(*manifests), batch=8)
    scores = robustness(eval_model())
    assert scores["cosine"] < scores["noise_cosine"]
    assert scores["fooling"] >= scores["noise_fooling"]
    assert robustness.perturbation is not None
    assert float(robustness.perturbation.abs().max()) <= 20 / 255 + 1e-7
    assert scores["accuracy"] > 0.3


def test_layers_are_the_blocks_in_order_and_leave_nothing_behind(manifests: tuple[Manifest, Manifest]) -> None:
    model = eval_model()
    images = torch.randn(2, 3, 24, 24)
    with torch.inference_mode():
        result = model.layers(images, 2)
        vit: Any = model.tower.vit
        last = F.layer_norm(
            vit.blocks[1](vit.blocks[0](vit.norm_pre(vit.pos_drop(vit._pos_embed(vit.patch_embed(images)))))), (16,)
        )
    torch.testing.assert_close(result[:, 1, 0], last[:, 0])
    torch.testing.assert_close(result[:, 1, 1], last[:, 1:].mean(1))
    assert not any(block._forward_hooks for block in model.tower.vit.blocks)


def test_evaluating_preserves_random_states_and_modes() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)).train()
    module[1].eval()
    state = torch.get_rng_state()
    with preserve_rng_and_mode([module]):
        assert not module[0].training
        torch.randn(3), np.random.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (module.training, module[0].training, module[1].training) == (True, True, False)


def test_unusable_data_is_refused(manifests: tuple[Manifest, Manifest], alone: None, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a text encoder"):
        Retrieval(RetrievalSettings(), data_of(*manifests))(eval_model())
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="the largest label is 2, and class_names has 2 lines"):
        ZeroShot(ZeroShotSettings(class_names=tmp_path / "classes.txt"), data_of(*manifests))(eval_model(texts=True))
    with ShardWriter(tmp_path, "bare") as writer:
        writer.write({"__key__": "one", "jpg": scenes._sample(scenes.render(1, 0, 32))["jpg"]})
        writer.write({"__key__": "two", "jpg": scenes._sample(scenes.render(1, 1, 32))["jpg"]})
    bare = build(writer.shards, tmp_path / "index")
    for name, message in (
        ("linear", "no labelled samples"),
        ("logistic", "no labelled samples"),
        ("segmentation", "no class map"),
    ):
        with pytest.raises(DataError, match=message):
            scores_of(name, bare, manifests[1], folder)
    with pytest.raises(DataError, match="have no caption"):
        scores_of("retrieval", manifests[0], bare, folder)


def test_tables_come_together_in_the_order_of_the_list(manifests: tuple[Manifest, Manifest], alone: None) -> None:
    table = all_gather_table(extract(images_of(manifests[0]), lambda x: x.mean((2, 3)), labelled=False), None)
    assert table.positions.tolist() == list(range(36))
    assert table.ids == [int(i) for i in manifests[0].ids()]
