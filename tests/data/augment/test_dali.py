"""The DALI graph against torchvision, operation by operation, on photographs; and the same pixels whatever the batch.

Distances are in levels of 0..255.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from pipeline.data.augment.dali import Augmenter, Hue
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.plan import ViewPlan, make_plan
from pipeline.data.augment.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from pipeline.data.pack.synthetic import render
from tests.conftest import data_folder

MEAN, STD = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
SIDE, COUNT = 96, 8
JITTER = Augment(flip_probability=0.0, jitter_probability=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue_shift=0.1)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Photographs if there are any, else scenes; the first is darkened, the second nearly gray."""
    folder = data_folder() / "photos"
    if folder.is_dir():
        files = random.Random(0).sample(sorted(folder.iterdir()), COUNT)
        found = [np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB")) for file in files]
    else:
        found = [render(1, index, 200 + 30 * index).image for index in range(COUNT)]
    found[0] = (found[0] * 0.25).astype(np.uint8)
    gray = found[1].mean(axis=2, keepdims=True)
    found[1] = (gray + 0.1 * (found[1] - gray)).astype(np.uint8)
    return found


@pytest.fixture(scope="module")
def squares(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """The pictures at the size of the view, so that resizing leaves them as they are."""
    return [np.asarray(ImageOps.fit(Image.fromarray(picture), (SIDE, SIDE))) for picture in pictures]


def still(images: list[np.ndarray], **changes: np.ndarray) -> ViewPlan:
    """A plan that shows whole pictures unchanged, but for ``changes``."""
    n = len(images)
    ones, off = np.ones(n, dtype=np.float32), np.zeros(n, dtype=bool)
    values = {
        "jitter": np.ones(n, dtype=bool),
        "brightness": ones,
        "contrast": ones,
        "saturation": ones,
        "hue": 0 * ones,
        "gray": off,
        "sigma": 0 * ones,
        "solarize": off,
    }
    return ViewPlan(
        start=np.zeros((n, 2), dtype=np.float32),
        end=np.array([image.shape[:2] for image in images], dtype=np.float32),
        flip=changes.pop("flip", np.zeros(n, dtype=np.int32)),
        values=values | changes,
    )


Interpolation = Literal["bicubic", "bilinear"]


def run(
    images: list[np.ndarray],
    augment: Augment,
    plan: ViewPlan,
    *,
    hue: Hue = "hsv",
    size: int = SIDE,
    interpolation: Interpolation = "bicubic",
) -> list[Tensor]:
    """Levels 0..255 of the one view, ``[3, size, size]`` each."""
    spec = ViewSpec("view", 1, size, (0.3, 1.0), augment=(augment,), interpolation=interpolation)
    augmenter = Augmenter((spec,), batch_size=len(images), hue=hue)
    (out,) = augmenter.run(images, [plan])["view"]
    assert out.dtype == torch.float32
    return list((out * STD + MEAN) * 255)


def tensors(images: list[np.ndarray]) -> list[Tensor]:
    return [torch.tensor(image).permute(2, 0, 1).contiguous() for image in images]


def distances(ours: list[Tensor], theirs: list[Tensor]) -> tuple[float, float]:
    """The largest mean absolute difference of a picture, and the largest difference of all."""
    differences = [(a - b.float()).abs() for a, b in zip(ours, theirs, strict=True)]
    return max(float(d.mean()) for d in differences), max(float(d.max()) for d in differences)


def spread(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, COUNT, dtype=np.float32)


def test_nothing_asked_for_changes_nothing(squares: list[np.ndarray]) -> None:
    everything = replace(JITTER, gray_probability=0.5, blur_probability=0.5, solarize_probability=0.5)
    for hue in ("off", "yiq"):
        assert distances(run(squares, everything, still(squares), hue=hue), tensors(squares))[1] < 1e-3
    assert distances(run(squares, everything, still(squares), hue="hsv"), tensors(squares))[1] < 1.001


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [224, 96, 32])
def test_crops_are_resized_like_pillows(pictures: list[np.ndarray], size: int, interpolation: Interpolation) -> None:
    filter_ = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    sizes = np.array([picture.shape[:2] for picture in pictures])
    spec = ViewSpec("view", 1, size, (0.05, 1.0))
    (plan,) = make_plan(
        (spec,), ids=np.arange(COUNT, dtype=np.uint64), epochs=np.zeros(COUNT, dtype=np.int64), sizes=sizes, seed=2
    )
    boxed, cropped = [], []
    for picture, (top, left), (bottom, right) in zip(pictures, plan.start.tolist(), plan.end.tolist(), strict=True):
        whole = Image.fromarray(picture)
        boxed.append(np.asarray(whole.resize((size, size), filter_, box=(left, top, right, bottom))))
        cropped.append(np.asarray(whole.crop((left, top, right, bottom)).resize((size, size), filter_)))
    ours = run(pictures, Augment(flip_probability=0.0), plan, size=size, interpolation=interpolation)
    differences = torch.stack([(a - b).abs() for a, b in zip(ours, tensors(boxed), strict=True)])
    assert differences.mean((1, 2, 3)).max() < 0.25
    assert (differences > 1.5).float().mean() < 0.002
    # torchvision cuts before it resizes, so that the filter sees nothing beyond the box: only pixels at the edge differ.
    assert distances([image[:, 3:-3, 3:-3] for image in ours], [image[:, 3:-3, 3:-3] for image in tensors(cropped)])[0] < 0.25
    assert distances(ours, tensors(cropped))[0] < 0.6


@pytest.mark.parametrize(
    ("name", "low", "high", "reference"),
    [
        ("brightness", 0.6, 1.4, F.adjust_brightness),
        ("contrast", 0.6, 1.4, F.adjust_contrast),
        ("saturation", 0.0, 2.0, F.adjust_saturation),
        ("hue", -0.5, 0.5, F.adjust_hue),
    ],
)
def test_colour_is_torchvisions_in_floating_point_rounded_once(
    squares: list[np.ndarray], name: str, low: float, high: float, reference: Callable[[Tensor, float], Tensor]
) -> None:
    values = spread(low, high)
    expected = [255 * reference(image / 255, float(value)) for image, value in zip(tensors(squares), values, strict=True)]
    mean, most = distances(run(squares, JITTER, still(squares, **{name: values})), expected)
    assert mean < 0.35
    assert most < 1.2
    assert distances(tensors(squares), expected)[0] > 5, "the operation does too little here for the test to mean anything"


def test_the_fast_hue_is_far_from_torchvisions_and_none_leaves_it_alone(squares: list[np.ndarray]) -> None:
    values = spread(-0.1, 0.1)
    plan = still(squares, hue=values)
    expected = [F.adjust_hue(image, float(value)) for image, value in zip(tensors(squares), values, strict=True)]
    exact, fast = (distances(run(squares, JITTER, plan, hue=hue), expected)[0] for hue in ("hsv", "yiq"))
    assert exact < 0.2
    assert fast > 3
    assert distances(run(squares, JITTER, plan, hue="off"), tensors(squares))[1] < 1e-3


def test_the_whole_jitter_is_torchvisions_in_a_fixed_order(squares: list[np.ndarray]) -> None:
    plan = still(
        squares, brightness=spread(1.4, 0.6), contrast=spread(0.6, 1.4), saturation=spread(1.2, 0.8), hue=spread(-0.1, 0.1)
    )
    expected = []
    for index, image in enumerate(tensors(squares)):
        image = F.adjust_brightness(image, float(plan.values["brightness"][index]))
        image = F.adjust_contrast(image, float(plan.values["contrast"][index]))
        image = F.adjust_saturation(image, float(plan.values["saturation"][index]))
        expected.append(F.adjust_hue(image, float(plan.values["hue"][index])))
    assert distances(run(squares, JITTER, plan), expected)[0] < 2.0


def test_gray_is_pillows(squares: list[np.ndarray]) -> None:
    expected = tensors([np.asarray(Image.fromarray(image).convert("L").convert("RGB")) for image in squares])
    mean, most = distances(
        run(squares, Augment(flip_probability=0.0, gray_probability=1.0), still(squares, gray=np.ones(COUNT, dtype=bool))),
        expected,
    )
    assert mean < 0.01
    assert most < 1.01


def test_blur_is_torchvisions_for_each_sigma(squares: list[np.ndarray]) -> None:
    sigma = spread(0.1, 2.0)
    expected = [F.gaussian_blur(image, [9, 9], [float(s)] * 2) for image, s in zip(tensors(squares), sigma, strict=True)]
    mean, most = distances(
        run(squares, Augment(flip_probability=0.0, blur_probability=1.0), still(squares, sigma=sigma)), expected
    )
    assert mean < 0.01
    assert most < 1.01


@pytest.mark.parametrize("threshold", [128, 60])
def test_solarizing_is_exact(squares: list[np.ndarray], threshold: int) -> None:
    augment = Augment(flip_probability=0.0, solarize_probability=1.0, solarize_threshold=threshold)
    expected = [F.solarize(image, threshold) for image in tensors(squares)]
    assert distances(run(squares, augment, still(squares, solarize=np.ones(COUNT, dtype=bool))), expected)[1] < 1e-3


def test_flipping_is_exact_and_each_samples_own(squares: list[np.ndarray]) -> None:
    flip = np.arange(COUNT, dtype=np.int32) % 2
    expected = [image.flip(2) if turned else image for image, turned in zip(tensors(squares), flip, strict=True)]
    assert distances(run(squares, Augment(), still(squares, flip=flip)), expected)[1] < 1e-3


def test_every_condition_acts_on_its_own_samples_only(squares: list[np.ndarray]) -> None:
    on = np.arange(COUNT) % 3 == 2
    cases = {
        "gray": (Augment(flip_probability=0.0, gray_probability=0.5), still(squares, gray=on)),
        "solarize": (Augment(flip_probability=0.0, solarize_probability=0.5), still(squares, solarize=on)),
        "blur": (
            Augment(flip_probability=0.0, blur_probability=0.5),
            still(squares, sigma=np.where(on, 2.0, 0.0).astype(np.float32)),
        ),
        "jitter": (JITTER, still(squares, jitter=on, brightness=spread(0.6, 0.7))),
    }
    for name, (augment, plan) in cases.items():
        for image, original, changed in zip(run(squares, augment, plan), tensors(squares), on, strict=True):
            same = (image - original).abs().max() < 1e-3
            assert bool(same) != bool(changed), name


def test_pixels_are_normalised_with_imagenets_numbers(squares: list[np.ndarray]) -> None:
    augmenter = Augmenter((ViewSpec("view", 1, SIDE, None),), batch_size=COUNT)
    (out,) = augmenter.run(squares, [still(squares)])["view"]
    for ours, image in zip(out, tensors(squares), strict=True):
        torch.testing.assert_close(ours, (image / 255 - MEAN) / STD, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("centre", "size"), [(1.0, 64), (0.875, 48)])
def test_the_evaluation_view_is_the_resized_centre_square(pictures: list[np.ndarray], centre: float, size: int) -> None:
    sizes = np.array([picture.shape[:2] for picture in pictures])
    spec = ViewSpec("image", 1, size, None, centre=centre)
    (plan,) = make_plan(
        (spec,), ids=np.arange(COUNT, dtype=np.uint64), epochs=np.zeros(COUNT, dtype=np.int64), sizes=sizes, seed=0
    )
    expected = []
    for picture in pictures:
        height, width = picture.shape[:2]
        side = min(height, width) * centre
        left, top = (width - side) / 2, (height - side) / 2
        resized = Image.fromarray(picture).resize(
            (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
        expected.append(tensors([np.asarray(resized)])[0])
    assert distances(run(pictures, Augment(flip_probability=0.0), plan, size=size), expected)[0] < 0.45


FULL = Augment(
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue_shift=0.1,
    gray_probability=0.2,
    blur_probability=0.5,
    solarize_probability=0.2,
)
SPECS = (
    ViewSpec("global", 2, 48, (0.32, 1.0), augment=(replace(FULL, blur_probability=0.0), FULL)),
    ViewSpec("local", 1, 24, (0.05, 0.32), augment=(FULL,)),
)


def crops(pictures: list[np.ndarray], ids: list[int], batch: int, threads: int) -> dict[int, list[Tensor]]:
    """All views of each picture, made in batches of at most ``batch``."""
    augmenter = Augmenter(SPECS, batch_size=batch, threads=threads)
    made: dict[int, list[Tensor]] = {}
    for low in range(0, len(ids), batch):
        chosen = ids[low : low + batch]
        images = [pictures[number] for number in chosen]
        plan = make_plan(
            SPECS,
            ids=np.array(chosen, dtype=np.uint64),
            epochs=np.zeros(len(chosen), dtype=np.int64),
            sizes=np.array([image.shape[:2] for image in images]),
            seed=4,
        )
        views = augmenter.run(images, plan)
        assert {name: [tuple(view.shape) for view in group] for name, group in views.items()} == {
            "global": [(len(chosen), 3, 48, 48)] * 2,
            "local": [(len(chosen), 3, 24, 24)],
        }
        for row, number in enumerate(chosen):
            made[number] = [view[row].clone() for group in views.values() for view in group]
    return made


def test_crops_are_bit_identical_for_any_batch_order_and_number_of_threads(pictures: list[np.ndarray]) -> None:
    small = [np.asarray(Image.fromarray(picture).resize((120 + 9 * n, 150 - 7 * n))) for n, picture in enumerate(pictures)]
    numbers = list(range(COUNT))
    reference = crops(small, numbers, COUNT, 1)
    shuffled = random.Random(3).sample(numbers, COUNT)
    for batch, threads, order in ((1, 1, numbers), (3, 4, shuffled)):
        other = crops(small, order, batch, threads)
        for number in numbers:
            assert all(map(torch.equal, other[number], reference[number])), (batch, threads, number)
    assert not torch.equal(reference[0][0], reference[0][1])
