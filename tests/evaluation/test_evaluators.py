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
from pipeline.evaluation.heads import held_out, train_heads
from pipeline.evaluation.linear import LinearProbe, LogisticRegression, fitted
from pipeline.evaluation.online import Pictures
from pipeline.evaluation.pairs import Retrieval, ZeroShot, numbered
from pipeline.evaluation.robustness import Fooled, Robustness, fooled
from pipeline.evaluation.segmentation import IGNORED, Segmentation, class_map, confusion, ious, mean_iou
from pipeline.evaluation.settings import RetrievalSettings
from pipeline.evaluation.table import all_gather_table, extract
from pipeline.models.eval_model import EvalModel, preserve_rng_and_mode
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.rank_pool import pool

CPU = torch.device("cpu")
CLASSES = 3


# ---- by hand ----------------------------------------------------------------------------------------------------------------


def test_intersection_over_union_by_hand() -> None:
    wanted = torch.tensor([[0, 0, 1, 1], [2, 2, IGNORED, IGNORED]])
    predicted = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 1]])
    matrix = confusion(predicted, wanted, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert ious(matrix)[:3].tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 2])
    assert math.isnan(float(ious(matrix)[3]))  # the fourth class is nowhere: it counts for nothing
    assert mean_iou(matrix) == pytest.approx(0.5)


def test_intersection_over_union_is_scikit_learns() -> None:
    from sklearn.metrics import confusion_matrix, jaccard_score

    generator = torch.Generator().manual_seed(0)
    wanted, predicted = (torch.randint(0, 5, (400,), generator=generator) for _ in range(2))
    wanted[:50] = IGNORED
    matrix = confusion(predicted, wanted, 5)
    assert np.array_equal(matrix.numpy(), confusion_matrix(wanted[50:], predicted[50:]))
    assert mean_iou(matrix) == pytest.approx(jaccard_score(wanted[50:], predicted[50:], average="macro"))


def test_fooling_compares_with_the_clean_answer_and_not_with_the_label() -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    clean = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    disturbed = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    assert fooled(clean, disturbed, labels) == Fooled(0.5, 0.75, 0.25, pytest.approx(2 / 3))


def test_pictures_that_share_a_caption_belong_together() -> None:
    images, owners, texts = numbered([("a", "b"), ("c",), ("b",)], merge=True)
    assert images[0] == images[2] != images[1]
    assert owners.tolist() == [images[0], images[0], images[1], images[2]]
    assert texts == ["a", "b", "c", "b"]


def test_images_over_a_chain_of_shared_captions_belong_together() -> None:
    images, owners, _ = numbered([("a",), ("b",), ("d",), ("a", "b")], merge=True)
    assert images[0] == images[1] == images[3] != images[2]
    assert owners.tolist() == [images[0], images[1], images[2], images[3], images[3]]


def test_by_default_an_image_answers_for_its_own_captions_only() -> None:
    images, owners, _ = numbered([("a", "b"), ("c",), ("b",)], merge=False)
    assert images.tolist() == [0, 1, 2] and owners.tolist() == [0, 0, 1, 2]
    assert not RetrievalSettings().merge_equal_captions


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_class_map_is_cut_like_its_picture() -> None:
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, 2:4], pixels[:, 4:6], pixels[0, 2] = 1, 2, 9
    found = class_map(png(pixels), size=4, classes=3, ignore=(9,), key="k")
    assert found.tolist() == [[IGNORED, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2]]
    assert class_map(png(pixels), size=2, classes=3, ignore=(9,), key="k").tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (png(np.full((4, 4), 7, dtype=np.uint8)), r"holds \[7\], but there are 3 classes"),
        (png(np.zeros((4, 4, 3), dtype=np.uint8)), "mode RGB"),
        (b"no picture", "cannot be read"),
    ],
)
def test_a_class_map_that_says_nothing_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        class_map(data, size=4, classes=3, ignore=(), key="k")


# ---- on shards --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """36 pictures to learn from and 14 to judge: class c is a bar of its colour in its third, maps say where."""
    folder = tmp_path_factory.mktemp("judged")
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


def shown(manifest: Manifest) -> Pictures:
    rank, world = dist.get_rank(), dist.get_world_size()
    return Pictures(manifest, size=24, most=None, batch=5, rank=rank, world=world, device=CPU)


def subject(texts: bool = False) -> EvalModel:
    torch.manual_seed(3)
    tower = build_tower(ModelSettings(embed_dim=16, depth=2, num_heads=2, patch_size=4, layer_scale=None), image_size=24).eval()

    def sentences(given: list[str]) -> Tensor:
        return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(len(t) + sum(map(ord, t)))) for t in given])

    if not texts:
        return EvalModel(tower, IMAGENET_MEAN, IMAGENET_STD)
    return EvalModel(tower, IMAGENET_MEAN, IMAGENET_STD, images=lambda x: tower(x).cls, texts=sentences)


def judge(name: str, train: Manifest, test: Manifest) -> dict[str, float]:
    """Scores of an evaluator on this rank."""
    bank, queries = shown(train), shown(test)
    readers = Reader(train, wants=("segmentation",)), Reader(test, wants=("segmentation",))
    made: dict[str, Any] = {
        "linear": lambda: LinearProbe(bank, queries, rates=(0.1, 1.0), layers=(1, 2), epochs=8, batch=8, hold_out=0.2),
        "logistic": lambda: LogisticRegression(bank, queries, costs=(0.1, 10.0), hold_out=0.2),
        "segmentation": lambda: Segmentation(
            bank, queries, readers, size=24, classes=2, ignore=(11,), rates=(0.1, 1.0), epochs=4, batch=8, names=("dark", "bar")
        ),
        "zeroshot": lambda: ZeroShot(queries, ["one", "two", "three"], templates=["a {}"]),
        "retrieval": lambda: Retrieval(queries, Reader(test, wants=("caption",))),
        "robustness": lambda: Robustness(bank, queries, epochs=1, k=3, batch=8),
    }
    scores: dict[str, float] = made[name]()(subject(texts=name in ("zeroshot", "retrieval")))
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "logistic", "segmentation", "zeroshot", "retrieval", "robustness"])
def test_two_ranks_give_the_scores_of_one(name: str, manifests: tuple[Manifest, Manifest], alone: None) -> None:
    expected = judge(name, *manifests)
    ranks = pool(2).run(judge, name=name, train=manifests[0], test=manifests[1])
    assert ranks[0] == ranks[1]
    assert ranks[0] == pytest.approx(expected, abs=1e-4)
    assert judge(name, *manifests) == expected


def test_a_probe_learns_what_is_linear(manifests: tuple[Manifest, Manifest], alone: None) -> None:
    assert judge("linear", *manifests)["linear/top1"] > 0.9
    scores = judge("segmentation", *manifests)
    assert scores["segmentation/miou"] > 0.9 > 0.4 > scores["segmentation/majority"]
    assert scores["segmentation/iou/bar"] > 0.9


def test_logistic_regression_is_scikit_learns(manifests: tuple[Manifest, Manifest], alone: None) -> None:
    from sklearn.linear_model import LogisticRegression as Reference

    judged = subject()
    tables = [extract(shown(manifest), judged.cls) for manifest in manifests]
    x, y = F.normalize(tables[0].values, dim=1).numpy(), tables[0].labels.numpy()
    assert len(y) == 36 - 5  # those without a class are left out
    found = judge("logistic", *manifests)
    model = Reference(C=found["logistic/cost"], max_iter=1000).fit(x, y)
    right = model.predict(F.normalize(tables[1].values, dim=1).numpy()) == tables[1].labels.numpy()
    assert found["logistic/top1"] == pytest.approx(right.mean())
    kept = held_out(36, 0.2)[tables[0].numbers].numpy()
    scores = {cost: (fitted(x[~kept], y[~kept], cost, 1000).predict(x[kept]) == y[kept]).mean() for cost in (0.1, 10.0)}
    assert found["logistic/cost"] == max(scores, key=lambda cost: (scores[cost], -cost))


def test_the_test_split_chooses_nothing(manifests: tuple[Manifest, Manifest], alone: None, tmp_path: Path) -> None:
    """With other labels in the test split the same rate and layers are chosen."""
    with ShardWriter(tmp_path, "other") as writer:
        for number, record in enumerate(Reader(manifests[1]).fetch(manifests[1].ids())):
            writer.write({"__key__": f"{number:04d}", "png": record.image, "cls": str((number * 5 + 1) % 3)})
    other = build(writer.shards, tmp_path / "index")
    first, second = judge("linear", *manifests), judge("linear", manifests[0], other)
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
    judged = Robustness(shown(manifests[0]), shown(manifests[1]), budget=20 / 255, epochs=4, k=3, batch=8)
    scores = judged(subject())
    assert scores["robustness/cosine"] < scores["robustness/noise_cosine"]
    assert scores["robustness/fooling"] >= scores["robustness/noise_fooling"]
    assert judged.perturbation is not None
    assert float(judged.perturbation.abs().max()) <= 20 / 255 + 1e-7
    assert scores["robustness/accuracy"] > 0.3


def test_layers_are_the_blocks_in_order_and_leave_nothing_behind(manifests: tuple[Manifest, Manifest]) -> None:
    judged = subject()
    images = torch.randn(2, 3, 24, 24)
    with torch.inference_mode():
        found = judged.layers(images, 2)
        vit: Any = judged.tower.vit
        last = F.layer_norm(
            vit.blocks[1](vit.blocks[0](vit.norm_pre(vit.pos_drop(vit._pos_embed(vit.patch_embed(images)))))), (16,)
        )
    torch.testing.assert_close(found[:, 1, 0], last[:, 0])
    torch.testing.assert_close(found[:, 1, 1], last[:, 1:].mean(1))
    assert not any(block._forward_hooks for block in judged.tower.vit.blocks)


def test_judging_disturbs_neither_random_numbers_nor_modes() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)).train()
    module[1].eval()
    state = torch.get_rng_state()
    with preserve_rng_and_mode([module]):
        assert not module[0].training
        torch.randn(3), np.random.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (module.training, module[0].training, module[1].training) == (True, True, False)


def test_what_cannot_be_judged_is_refused(manifests: tuple[Manifest, Manifest], alone: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wants a text tower"):
        Retrieval(shown(manifests[1]), Reader(manifests[1]))(subject())
    with pytest.raises(DataError, match="labels reach to 2, 2 classes are named"):
        ZeroShot(shown(manifests[1]), ["one", "two"])(subject(texts=True))
    with ShardWriter(tmp_path, "bare") as writer:
        writer.write({"__key__": "one", "jpg": scenes._sample(scenes.render(1, 0, 32))["jpg"]})
        writer.write({"__key__": "two", "jpg": scenes._sample(scenes.render(1, 1, 32))["jpg"]})
    bare = build(writer.shards, tmp_path / "index")
    for name, told in (("linear", "no labelled samples"), ("logistic", "no labelled samples"), ("segmentation", "no class map")):
        with pytest.raises(DataError, match=told):
            judge(name, bare, manifests[1])
    with pytest.raises(DataError, match="have no caption"):
        judge("retrieval", manifests[0], bare)


def test_tables_come_together_in_the_order_of_the_list(manifests: tuple[Manifest, Manifest], alone: None) -> None:
    table = all_gather_table(extract(shown(manifests[0]), lambda x: x.mean((2, 3)), labelled=False), None)
    assert table.numbers.tolist() == list(range(36))
    assert table.ids == [int(i) for i in manifests[0].ids()]
