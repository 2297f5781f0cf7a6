"""Views of every method: the same crops however the work is dealt, and whole chains within reach of torchvision's."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import functional as T

from pipeline.data.augment.dali import Augmenter
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.plan import ViewPlan, make_plan
from pipeline.data.augment.views import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD, Batch, Normalize, ViewSpec
from pipeline.data.index.build import build
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import Order
from pipeline.data.pack import synthetic as scenes
from pipeline.data.pack.shard_writer import ShardWriter

COLOUR = Augment(jitter_probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue_shift=0.1, gray_probability=0.2)
OPENAI = Normalize(OPENAI_MEAN, OPENAI_STD)
DETAIL = replace(COLOUR, flip_probability=0.0, blur_probability=0.1, blur_kernel="auto", solarize_probability=0.2)


def dino(*blur: float) -> tuple[ViewSpec, ...]:
    first, second, local = (replace(COLOUR, blur_probability=p) for p in blur)
    return (
        ViewSpec("global", 2, 48, (0.32, 1.0), augment=(first, replace(second, solarize_probability=0.2))),
        ViewSpec("local", 3, 24, (0.05, 0.32), augment=(local,), boxes=True),
    )


KINDS: dict[str, tuple[ViewSpec, ...]] = {
    "dinov2 as released": dino(0.0, 0.9, 0.5),
    "dinov2 by the paper": dino(1.0, 0.1, 0.5),
    "clip": (ViewSpec("image", 1, 48, (0.9, 1.0), augment=(Augment(flip_probability=0.0),), normalize=OPENAI),),
    "clip, judged": (ViewSpec("image", 1, 48, None, normalize=OPENAI),),
    "detailclip": (ViewSpec("image", 2, 48, (0.14, 1.0), augment=(DETAIL,), boxes=True),),
    "slip": (
        ViewSpec("image", 1, 48, (0.5, 1.0)),
        ViewSpec(
            "pair", 2, 48, (0.08, 1.0), augment=(replace(COLOUR, saturation=0.4, blur_probability=0.5, blur_kernel="auto"),)
        ),
    ),
    "byol": (
        ViewSpec(
            "pair",
            2,
            48,
            (0.08, 1.0),
            augment=(
                replace(COLOUR, blur_probability=1.0, blur_kernel=23),
                replace(COLOUR, blur_probability=0.1, blur_kernel=23, solarize_probability=0.2),
            ),
            boxes=True,
        ),
    ),
}
SEED, GLOBAL = 3, 8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "train", samples_per_shard=16) as writer:
        for number in range(32):
            writer.write({"__key__": f"{number:04d}", **scenes._sample(scenes.render(2, number, 40 + 3 * number))})
    return build(list(writer.shards), folder / "index")


def crops(
    manifest: Manifest, specs: tuple[ViewSpec, ...], *, world: int = 1, micro: int | None = None, threads: int = 1
) -> dict[int, list[Tensor]]:
    """All views, and boxes, of each sample of the first step, made by ``world`` ranks in micro-batches of ``micro``."""
    made: dict[int, list[Tensor]] = {}
    for rank in range(world):
        order = Order(manifest.sizes, SEED, GLOBAL, streams=4, block_size=8)
        dataset = StepDataset(Reader(manifest), order, specs, seed=SEED, world=world, rank=rank)
        options = StreamOptions(micro_batch=micro or GLOBAL // world, workers=0, threads=threads, hue="yiq")
        stream = BatchStream(dataset, device=torch.device("cpu"), options=options, bad_samples=BadSamples(None), first=0, last=1)
        for _, batches in stream:
            for batch in batches:
                for row, number in enumerate(batch.ids):
                    assert number not in made
                    made[number] = rows(batch, row)
    return made


def rows(batch: Batch, row: int) -> list[Tensor]:
    found = [view[row] for views in batch.views.values() for view in views]
    for boxes in batch.boxes.values():
        found += [tensor[row] for tensor in (*boxes.corners, *boxes.flipped)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_samples_views_are_the_same_bits_for_any_world_micro_batch_and_threads(manifest: Manifest, kind: str) -> None:
    specs = KINDS[kind]
    reference = crops(manifest, specs)
    assert len(reference) == GLOBAL
    for world, micro, threads in ((2, 2, 1), (4, None, 2)):
        other = crops(manifest, specs, world=world, micro=micro, threads=threads)
        assert other.keys() == reference.keys()
        for number, views in reference.items():
            assert all(map(torch.equal, other[number], views)), (world, micro, threads)
    views = next(iter(reference.values()))
    if specs[-1].count > 1:
        assert not torch.equal(views[0], views[1])


def test_views_outlive_the_batches_that_come_after_them(manifest: Manifest) -> None:
    """Their memory is DALI's own, handed over: nothing may be written into it later."""
    specs = KINDS["dinov2 as released"]
    order = Order(manifest.sizes, SEED, GLOBAL, streams=4, block_size=8)
    dataset = StepDataset(Reader(manifest), order, specs, seed=SEED, world=1, rank=0)
    options = StreamOptions(micro_batch=2, workers=0, hue="off")
    kept, copies = [], []
    for _, batches in BatchStream(
        dataset, device=torch.device("cpu"), options=options, bad_samples=BadSamples(None), first=0, last=8
    ):
        for batch in batches:
            kept += [view for views in batch.views.values() for view in views]
            copies += [view.clone() for views in batch.views.values() for view in views]
    assert all(map(torch.equal, kept, copies))
    assert len({view.data_ptr() for view in kept}) == len(kept)


def photographs(request: pytest.FixtureRequest) -> list[np.ndarray]:
    """Eight photographs, or scenes; the first is darkened to a quarter."""
    try:
        folder: Path = request.getfixturevalue("shared_data") / "photos"
        files = random.Random(1).sample(sorted(folder.iterdir()), 8)
        found = [np.asarray(Image.open(file).convert("RGB").resize((320, 240))) for file in files]
    except pytest.skip.Exception:
        found = [scenes.render(1, index, 240).image for index in range(8)]
    found[0] = (found[0] * 0.25).astype(np.uint8)
    return found


def levels(out: Tensor, normalize: Normalize) -> Tensor:
    return (out * torch.tensor(normalize.std).view(3, 1, 1) + torch.tensor(normalize.mean).view(3, 1, 1)) * 255


def through_pillow(picture: np.ndarray, plan: ViewPlan, row: int, size: int, kernel: int | str) -> Tensor:
    """The chain that torchvision's classic transforms would run on a Pillow picture, with the choices of our plan."""

    def chosen(field: str) -> float:
        return float(plan.arrays[field][row])

    (top, left), (bottom, right) = plan.start[row].tolist(), plan.end[row].tolist()
    image = Image.fromarray(picture).crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BICUBIC)
    if chosen("flip"):
        image = T.hflip(image)
    if chosen("jitter"):
        steps: list[tuple[Callable[..., Image.Image], str]] = [
            (T.adjust_brightness, "brightness"),
            (T.adjust_contrast, "contrast"),
            (T.adjust_saturation, "saturation"),
            (T.adjust_hue, "hue"),
        ]
        for step, field in steps:
            image = step(image, chosen(field))
    if chosen("gray"):
        image = T.to_grayscale(image, 3)
    if chosen("sigma") > 0:
        sigma = chosen("sigma")
        image = (
            image.filter(ImageFilter.GaussianBlur(sigma))
            if kernel == "auto"
            else T.gaussian_blur(image, [kernel] * 2, [sigma] * 2)
        )
    if chosen("solarize"):
        image = T.solarize(image, 128)
    return torch.tensor(np.asarray(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize(("size", "scale"), [(224, (0.32, 1.0)), (96, (0.05, 0.32))])
@pytest.mark.parametrize("kernel", [9, "auto"])
def test_whole_chains_stay_within_reach_of_torchvisions(
    request: pytest.FixtureRequest, size: int, scale: tuple[float, float], kernel: int
) -> None:
    """Rounding to whole levels between operations, eight times: 1.2 to 1.3 levels on average where all of them run."""
    augment = replace(COLOUR, jitter_probability=1.0, blur_probability=0.5, blur_kernel=kernel, solarize_probability=0.0)
    pictures = photographs(request)
    spec = ViewSpec("view", 1, size, scale, augment=(augment,))
    sizes = np.array([picture.shape[:2] for picture in pictures])
    ids, epochs = np.arange(8, dtype=np.uint64), np.zeros(8, dtype=np.int64)
    (plan,) = make_plan((spec,), ids=ids, epochs=epochs, sizes=sizes, seed=11)
    (out,) = Augmenter((spec,), batch_size=8, hue="hsv").run(pictures, [plan])["view"]
    ours = levels(out, spec.normalize)
    differences = [(ours[row] - through_pillow(pictures[row], plan, row, size, kernel)).abs() for row in range(8)]
    assert np.mean([float(difference.mean()) for difference in differences]) < 1.5
    assert max(float(difference.mean()) for difference in differences) < 3.0
    assert float(torch.quantile(torch.cat([d.flatten()[::7] for d in differences]), 0.99)) < 9


def test_a_dark_pictures_contrast_turns_around_its_own_mean(request: pytest.FixtureRequest) -> None:
    augment = Augment(flip_probability=0.0, jitter_probability=1.0, contrast=0.4)
    dark = [(picture * 0.2).astype(np.uint8) for picture in photographs(request)]
    spec = ViewSpec("view", 1, 96, (0.3, 1.0), augment=(augment,))
    sizes = np.array([picture.shape[:2] for picture in dark])
    (plan,) = make_plan((spec,), ids=np.arange(8, dtype=np.uint64), epochs=np.zeros(8, dtype=np.int64), sizes=sizes, seed=1)
    (out,) = Augmenter((spec,), batch_size=8).run(dark, [plan])["view"]
    ours = levels(out, spec.normalize)
    for row in range(8):
        assert float((ours[row] - through_pillow(dark[row], plan, row, 96, 9)).abs().mean()) < 1.0


def test_a_blur_of_pillows_radius_is_near_to_pillows(request: pytest.FixtureRequest) -> None:
    augment = Augment(flip_probability=0.0, blur_probability=1.0, blur_kernel="auto")
    pictures = photographs(request)
    spec = ViewSpec("view", 1, 224, (0.5, 1.0), augment=(augment,))
    sizes = np.array([picture.shape[:2] for picture in pictures])
    (plan,) = make_plan((spec,), ids=np.arange(8, dtype=np.uint64), epochs=np.zeros(8, dtype=np.int64), sizes=sizes, seed=5)
    (out,) = Augmenter((spec,), batch_size=8).run(pictures, [plan])["view"]
    ours = levels(out, spec.normalize)
    distances = [float((ours[row] - through_pillow(pictures[row], plan, row, 224, "auto")).abs().mean()) for row in range(8)]
    assert max(distances) < 1.0
    wide = plan.values["sigma"] > 1.5
    assert wide.any(), "no wide blur was drawn: the test says nothing"


@pytest.mark.parametrize("normalize", [Normalize(), OPENAI])
def test_views_are_normalised_with_the_numbers_of_their_method(normalize: Normalize) -> None:
    gray = [np.full((32, 32, 3), 100, dtype=np.uint8)]
    spec = ViewSpec("image", 1, 16, None, normalize=normalize)
    plain = ViewSpec("plain", 1, 16, None)
    sizes, ids, epochs = np.array([[32, 32]]), np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.int64)
    plan = make_plan((spec, plain), ids=ids, epochs=epochs, sizes=sizes, seed=0)
    views = Augmenter((spec, plain), batch_size=1).run(gray, plan)
    for name, mean, std in (("image", normalize.mean, normalize.std), ("plain", IMAGENET_MEAN, IMAGENET_STD)):
        expected = (100 / 255 - torch.tensor(mean)) / torch.tensor(std)
        torch.testing.assert_close(views[name][0][0].mean((1, 2)), expected, atol=1e-5, rtol=0)


def test_boxes_tell_where_a_view_was_cut(manifest: Manifest) -> None:
    """Cutting the picture itself at the box gives the view."""
    specs = (ViewSpec("view", 2, 32, (0.2, 0.6), augment=(Augment(),), boxes=True), ViewSpec("silent", 1, 16, None))
    order = Order(manifest.sizes, SEED, GLOBAL, streams=4, block_size=8)
    dataset = StepDataset(Reader(manifest), order, specs, seed=SEED, world=1, rank=0)
    options = StreamOptions(micro_batch=4, workers=0)
    stream = BatchStream(dataset, device=torch.device("cpu"), options=options, bad_samples=BadSamples(None), first=0, last=1)
    decoded = {record.id: record.image for record in dataset[0].records}
    ((_, batches),) = list(stream)
    flips = set()
    for batch in batches:
        assert set(batch.boxes) == {"view"}
        boxes = batch.boxes["view"]
        for view, corners, flipped in zip(batch.views["view"], boxes.corners, boxes.flipped, strict=True):
            assert (corners.shape, corners.dtype, flipped.dtype) == ((4, 4), torch.float32, torch.bool)
            for row, number in enumerate(batch.ids):
                data = decoded[number]
                assert data is not None
                top, left, bottom, right = corners[row].tolist()
                cut = open_picture(data).resize((32, 32), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
                expected = torch.tensor(np.asarray(cut)).permute(2, 0, 1).float()
                expected = expected.flip(2) if flipped[row] else expected
                assert float((levels(view[row], Normalize()) - expected).abs().mean()) < 0.5
                flips.add(bool(flipped[row]))
    assert flips == {True, False}


def open_picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
