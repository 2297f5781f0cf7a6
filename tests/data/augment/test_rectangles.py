"""Rectangular views: the plan, the graph and the masks against NumPy; elongated images; squares as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.augment.dali import Augmenter
from pipeline.data.augment.masks import block_masks, mask_counts
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.plan import centred_boxes, make_plan, random_boxes
from pipeline.data.augment.views import MaskSpec, ViewSpec
from pipeline.data.channel_settings import ChannelSettings
from pipeline.data.index.build import build
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import Order
from pipeline.data.order.random import uniforms
from pipeline.data.pack import synthetic as scenes
from tests.data.augment.test_channels import smooth
from tests.helpers import channel_reference

RATIO = (3 / 4, 4 / 3)
SIZES = st.tuples(st.integers(16, 3000), st.integers(16, 3000))


def crops(spec: ViewSpec, sizes: np.ndarray, seed: int = 3) -> np.ndarray:
    """Top, left, height, width of one view of each image, ``[n, 4]``."""
    n = len(sizes)
    (plan,) = make_plan((spec,), ids=np.arange(n, dtype=np.uint64), epochs=np.zeros(n, np.int64), sizes=sizes, seed=seed)
    return np.concatenate([plan.start, plan.end - plan.start], axis=1)


def reference(draws: np.ndarray, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> list[int]:
    """The crop of one image: the first of ten draws that fits, else the middle with the nearest aspect ratio."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        aspect = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * draws[10 + attempt])
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w]
    if width / height > ratio[1]:
        h, w = height, max(round(height * ratio[1]), 1)
    else:
        h, w = max(round(width / ratio[0]), 1), width
    return [(height - h) // 2, (width - w) // 2, h, w]


@settings(max_examples=100)
@given(size=SIZES, shape=st.tuples(st.integers(8, 512), st.integers(8, 512)), number=st.integers(0, 1 << 40))
def test_the_crops_are_those_of_the_reference(size: tuple[int, int], shape: tuple[int, int], number: int) -> None:
    spec = ViewSpec("global", 1, shape, (0.32, 1.0))
    ids = np.array([number], dtype=np.uint64)
    (plan,) = make_plan((spec,), ids=ids, epochs=np.zeros(1, np.int64), sizes=np.array([size]), seed=9)
    draws = uniforms(ids, 22, 9, 0, epochs=np.zeros(1, np.int64))[0]
    ratio = (RATIO[0] * shape[1] / shape[0], RATIO[1] * shape[1] / shape[0]) if shape[0] != shape[1] else RATIO
    top, left, height, width = reference(draws, *size, (0.32, 1.0), ratio)
    assert plan.start[0].tolist() == [top, left]
    assert (plan.end - plan.start)[0].tolist() == [height, width]


def test_aspect_ratios_are_relative_to_the_view() -> None:
    sizes = np.tile(np.array([[600, 900]]), (4000, 1))
    boxes = crops(ViewSpec("global", 1, (224, 448), (0.1, 0.4)), sizes)
    relative = boxes[:, 3] / boxes[:, 2] / 2
    assert 0.74 < relative.min() < 0.78 and 1.28 < relative.max() < 1.35
    assert abs(np.log(relative).mean()) < 0.01, "as often narrower than the view as wider"


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 4000), (100, 267)),  # the widest allowed: 2 * 4 / 3
        ((4000, 100), (67, 100)),  # the narrowest allowed: 2 * 3 / 4
        ((16, 20000), (16, 43)),
    ],
)
def test_images_too_elongated_are_cropped_in_the_middle(size: tuple[int, int], box: tuple[int, int]) -> None:
    boxes = crops(ViewSpec("global", 1, (224, 448), (0.5, 1.0)), np.tile(np.array([size]), (50, 1)))
    assert (boxes[:, 2:] == box).all()
    assert np.abs(boxes[:, :2] * 2 + boxes[:, 2:] - size).max() <= 1


def test_no_crop_is_empty() -> None:
    draws = uniforms(np.arange(200, dtype=np.uint64), 22, 0)
    for ratio in ((3 / 2048, 4 / 1536), (1536 / 4, 2048 / 3)):
        boxes = random_boxes(draws, np.tile(np.array([[20, 17]]), (200, 1)), (0.9, 1.0), ratio)
        assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] + boxes[:, 2:] <= (20, 17)).all()


@given(size=SIZES, share=st.floats(0.1, 1.0), position=st.floats(0, 1))
def test_evaluation_views_of_squares_are_those_of_earlier_versions(size: tuple[int, int], share: float, position: float) -> None:
    sizes = np.array([size])
    side = sizes.min(axis=1) * share
    slack = sizes - side[:, None]
    start = np.where(sizes > sizes.min(axis=1, keepdims=True), slack * position, slack / 2)
    before = np.stack([start[:, 0], start[:, 1], side, side], axis=1).astype(np.float32)
    assert np.array_equal(centred_boxes(sizes, (224, 224), share, position), before)


@given(size=SIZES, shape=st.tuples(st.integers(8, 512), st.integers(8, 512)))
def test_an_evaluation_view_is_the_largest_box_of_its_aspect_ratio(size: tuple[int, int], shape: tuple[int, int]) -> None:
    top, left, height, width = centred_boxes(np.array([size]), shape, 1.0, 0.5)[0].tolist()
    assert height / width == pytest.approx(shape[0] / shape[1], rel=1e-5)
    assert height == pytest.approx(size[0], rel=1e-5) or width == pytest.approx(size[1], rel=1e-5)
    assert 2 * top + height == pytest.approx(size[0], rel=1e-4) and 2 * left + width == pytest.approx(size[1], rel=1e-4)


def test_an_image_of_the_views_aspect_ratio_is_seen_whole() -> None:
    assert centred_boxes(np.array([[300, 600]]), (224, 448), 1.0, 0.5).tolist() == [[0, 0, 300, 600]]


CHANNELS = ChannelSettings(count=4, names=("a", "b", "c", "d"), mean=(0.5,) * 4, std=(0.25,) * 4)


@pytest.mark.parametrize("scale", [(0.3, 1.0), None])
def test_views_are_numpys(scale: tuple[float, float] | None) -> None:
    augment = Augment(jitter_probability=1.0, brightness=0.3, contrast=0.3, blur_probability=0.5, noise=0.2, gain=0.1)
    spec = ViewSpec("global", 1, (24, 56), scale, augment=(augment,)).of_channels(CHANNELS)
    images = [smooth("uint16", 4, seed, 60, 90).astype(np.float32) for seed in range(3)]
    ids, epochs = np.arange(3, dtype=np.uint64), np.zeros(3, np.int64)
    (plan,) = make_plan((spec,), ids=ids, epochs=epochs, sizes=np.array([[60, 90]] * 3), seed=5)
    (made,) = Augmenter((spec,), batch_size=3).run(images, [plan])["global"]
    assert made.shape == (3, 4, 24, 56)
    for row, image in enumerate(images):
        assert np.abs(made[row].numpy() - channel_reference.view(image, spec, plan, row)).max() < 1e-3


def test_square_and_rectangular_views_of_one_method() -> None:
    specs = (
        ViewSpec("global", 2, (16, 40), (0.3, 1.0)),
        ViewSpec("local", 2, 16, (0.1, 0.3)),
        ViewSpec("tall", 1, (40, 16), None),
    )
    images = [np.random.default_rng(n).integers(0, 255, (50, 70, 3), dtype=np.uint8) for n in range(2)]
    plan = make_plan(
        specs, ids=np.arange(2, dtype=np.uint64), epochs=np.zeros(2, np.int64), sizes=np.array([[50, 70]] * 2), seed=5
    )
    views = Augmenter(specs, batch_size=2).run(images, plan)
    assert [tuple(view.shape[1:]) for name in ("global", "local", "tall") for view in views[name]] == [
        *[(3, 16, 40)] * 2,
        *[(3, 16, 16)] * 2,
        (3, 40, 16),
    ]
    alone = Augmenter(specs[1:2], batch_size=2).run(images, plan[2:4])["local"]
    assert all(np.array_equal(one.numpy(), other.numpy()) for one, other in zip(alone, views["local"], strict=True))


@pytest.mark.parametrize("grid", [(2, 12), (12, 2), (1, 9)])
def test_blocks_are_masked_in_rows_of_the_grid(grid: tuple[int, int]) -> None:
    patches = grid[0] * grid[1]
    counts = mask_counts(400, patches, MaskSpec(8, 1.0, (0.2, 0.5)), 0)
    masks = block_masks(counts, *grid, np.arange(400, dtype=np.uint64), 1)
    assert masks.shape == (400, patches) and np.array_equal(masks.sum(1), counts)
    shaped = masks.reshape(400, *grid)
    beside = (shaped[:, :, 1:] & shaped[:, :, :-1]).sum() / (shaped[:, :, 1:].sum() or 1)
    assert beside > 1.2 * masks.mean(), "neighbours in a row are masked together"


def test_masks_have_the_grid_of_their_views(tmp_path: Path) -> None:
    shards = scenes.write(tmp_path / "s", train=16, val=1, size=32, samples_per_shard=16)
    manifest = build(shards[:1], tmp_path / "index")
    spec = ViewSpec("global", 2, (16, 48), (0.3, 1.0), mask=MaskSpec(8))
    dataset = StepDataset(Reader(manifest), Order(manifest.sizes, 1, 8, 4, 16), (spec,), seed=3, world=1, rank=0)
    batch = dataset[0]
    assert batch.masks["global"].shape == (2, 8, 12)
    square = StepDataset(
        Reader(manifest), Order(manifest.sizes, 1, 8, 4, 16), (replace(spec, size=(32, 24)),), seed=3, world=1, rank=0
    )[0]
    assert square.masks["global"].sum() == batch.masks["global"].sum(), "as many patches in the batch, whatever the grid"
