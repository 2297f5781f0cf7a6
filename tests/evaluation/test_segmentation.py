"""Class maps in their own size: borders and squares by hand, and whole images from shards on one rank and two."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from pipeline.data.augment.views import IMAGENET_MEAN, IMAGENET_STD
from pipeline.data.index.build import build
from pipeline.data.index.manifest import Manifest
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.errors import DataError
from pipeline.evaluation.images import ImageSet
from pipeline.evaluation.segmentation import (
    Segmentation,
    _class_shares,
    confusion,
    full_map,
    ious,
    merge_windows,
    window_positions,
)
from pipeline.evaluation.settings import SegmentationSettings
from pipeline.models.eval_model import EvalModel
from pipeline.models.resnet import build_trunk
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.evaluation import eval_data, image_set
from tests.helpers.rank_pool import pool

SIZE, HIGH, WIDE = 16, 24, 60


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def second(values: list[list[float]]) -> Tensor:
    """Logits of two classes, the first 0 everywhere."""
    one = torch.tensor(values)
    return torch.stack([torch.zeros_like(one), one])


def test_borders_are_where_enlarged_logits_cross_by_hand() -> None:
    # From two patches, -1 and 5, to four pixels: -1, -1 + 6/4, -1 + 18/4, 5.
    result = merge_windows([second([[-1.0, 5.0], [-1.0, 5.0]])], [0.5], 4, 4)
    assert result.tolist() == [[0, 1, 1, 1]] * 4
    target = torch.tensor([[0, 0, 1, 1]] * 4)
    assert ious(confusion(result, target, 2)).tolist() == pytest.approx([1 / 2, 2 / 3])
    # In the network's own size, where each patch is a pixel, nothing is wrong.
    small = merge_windows([second([[-1.0, 5.0], [-1.0, 5.0]])], [0.5], 2, 2)
    assert ious(confusion(small, target[::2, ::2], 2)).tolist() == [1.0, 1.0]


def test_where_squares_overlap_their_mean_decides_by_hand() -> None:
    squares = [second([[value]]) for value in (-1.0, 3.0, -5.0)]
    # Columns 0 and 1 are of the first, 1 and 2 of the second, 2 and 3 of the third: -1, (-1 + 3) / 2, (3 - 5) / 2, -5.
    assert merge_windows(squares, [0.0, 0.5, 1.0], 2, 4).tolist() == [[0, 1, 0, 0]] * 2
    assert merge_windows(squares, [0.0, 0.5, 1.0], 4, 2).tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


def test_a_whole_map_is_as_it_is_stored() -> None:
    pixels = np.array([[0, 1, 9], [1, 1, 0]], dtype=np.uint8)
    assert full_map(png(pixels), classes=2, ignore=(9,), key="k").tolist() == [[0, 1, 255], [1, 1, 0]]
    with pytest.raises(DataError, match=r"must be 0 to 1, and it holds \[9\]"):
        full_map(png(pixels), classes=2, ignore=(), key="k")


# ---- on shards --------------------------------------------------------------------------------------------------------------


def made(folder: Path, name: str, first: int, count: int, shape: tuple[int, int]) -> Manifest:
    """Images of bright columns on dark ground, whose maps say so."""
    with ShardWriter(folder, name) as writer:
        for number in range(first, first + count):
            random = np.random.default_rng(number)
            pixels = random.integers(0, 60, (*shape, 3), dtype=np.uint8)
            classes = np.zeros(shape, dtype=np.uint8)
            for column in range(0, shape[1], 12):
                if random.random() < 0.5:
                    pixels[:, column : column + 12] += np.uint8(180)
                    classes[:, column : column + 12] = 1
            writer.write({"__key__": f"{number:03d}", "png": png(pixels), "seg.png": png(classes)})
    return build(writer.shards, folder / f"index-{name}")


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """Square images to learn from, wide ones to evaluate."""
    folder = tmp_path_factory.mktemp("columns")
    return made(folder, "train", 0, 24, (HIGH, HIGH)), made(folder, "test", 100, 9, (HIGH, WIDE))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def images_of(manifest: Manifest, position: float = 0.5) -> ImageSet:
    return image_set(manifest, size=SIZE, batch_size=4, crop_position=position)


def scores_of(train: Manifest, test: Manifest, whole: bool) -> dict[str, float]:
    torch.manual_seed(3)
    tower = build_tower(ModelSettings(embed_dim=16, depth=1, num_heads=2, patch_size=4, layer_scale=None), image_size=SIZE).eval()
    settings = SegmentationSettings(num_classes=2, learning_rates=(1.0,), epochs=8, batch_size=8, sliding_window=whole)
    evaluator = Segmentation(settings, eval_data(size=SIZE, class_maps=(train, test)))
    return evaluator(EvalModel(tower, IMAGENET_MEAN, IMAGENET_STD))


def test_squares_reach_from_end_to_end_and_share_a_third(manifests: tuple[Manifest, Manifest]) -> None:
    assert window_positions(manifests[0]) == [0.5]
    result = window_positions(manifests[1])  # 36 pixels of slack, at most 16 from one to the next
    assert result == [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]


def test_a_square_is_cut_where_it_is_said_to_lie(tmp_path: Path, alone: None) -> None:
    pixels = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], HIGH, axis=0).repeat(3, axis=2)
    with ShardWriter(tmp_path, "ramp") as writer:
        writer.write({"__key__": "wide", "png": png(pixels)})
        writer.write({"__key__": "high", "png": png(pixels.transpose(1, 0, 2).copy())})
    manifest = build(writer.shards, tmp_path / "index")
    for place in (0.0, 1 / 3, 1.0):
        wide, high = next(iter(images_of(manifest, place))).images
        gray = (wide[0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]) * 255
        first = place * (WIDE - HIGH)
        assert float(gray.mean()) == pytest.approx(4 * (first + (HIGH - 1) / 2), abs=1.0)
        torch.testing.assert_close(wide, high.transpose(1, 2), atol=0.02, rtol=0)


def test_whole_maps_are_evaluated_to_their_ends(manifests: tuple[Manifest, Manifest], alone: None) -> None:
    part, whole = scores_of(*manifests, whole=False), scores_of(*manifests, whole=True)
    assert 0.8 < whole["miou"] < 1 and part["miou"] > 0.8
    assert part["rate"] == whole["rate"]
    right = whole["pixels"] * 9 * HIGH * WIDE
    assert right == pytest.approx(round(right), abs=1e-6) and right > 9 * HIGH * HIGH  # more than the squares in the middle hold


def test_cells_that_reach_beyond_the_image_count_its_pixels_alone(manifests: tuple[Manifest, Manifest], alone: None) -> None:
    """A ResNet pads: 20 pixels are three cells of 8 a side."""
    shares = _class_shares(torch.tensor([[[0] * 10 + [1] * 10] * 20]), 8, 2, 9)
    assert shares.shape == (1, 9, 2)
    assert shares[0].tolist() == [
        [1, 0],
        [0.25, 0.75],
        [0, 0.5],
        [1, 0],
        [0.25, 0.75],
        [0, 0.5],
        [0.5, 0],
        [0.125, 0.375],
        [0, 0.25],
    ]
    tower = build_trunk(ModelSettings(timm_name="resnet18", resnet_width=8, stem="small"), image_size=20).eval()
    settings = SegmentationSettings(num_classes=2, learning_rates=(1.0,), epochs=2, batch_size=8)
    scores = Segmentation(settings, eval_data(size=20, class_maps=manifests))(EvalModel(tower, IMAGENET_MEAN, IMAGENET_STD))
    assert 0 <= scores["miou"] <= 1


def test_two_ranks_give_the_scores_of_one_for_whole_maps(manifests: tuple[Manifest, Manifest], alone: None) -> None:
    expected = scores_of(*manifests, whole=True)
    ranks = pool(2).run(scores_of, train=manifests[0], test=manifests[1], whole=True)
    assert ranks[0] == ranks[1] == pytest.approx(expected, abs=1e-4)
