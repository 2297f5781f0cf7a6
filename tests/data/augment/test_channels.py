"""Views of images with declared channels: the DALI graph against NumPy; draws of RGB images that stay as they were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data.augment import dali
from pipeline.data.augment.dali import Augmenter
from pipeline.data.augment.operators import CHANNEL_OPERATORS, OPERATORS, Augment
from pipeline.data.augment.plan import ViewPlan, make_plan
from pipeline.data.augment.views import ViewSpec
from pipeline.data.channel_settings import ChannelSettings
from tests.helpers.channel_images import random_image
from tests.helpers.channel_reference import view as expected_view

COUNT = 12
EVERYTHING = Augment(
    jitter_probability=0.7,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue_shift=0.2,
    gray_probability=0.3,
    blur_probability=0.5,
    solarize_probability=0.4,
    gain=0.3,
    offset=0.5,
    noise=0.4,
    channel_dropout=0.4,
)


def smooth(dtype: str, count: int, seed: int, height: int = 61, width: int = 75) -> np.ndarray:
    """Waves over the full range: noise would make every resampling look alike."""
    y, x = np.mgrid[:height, :width]
    random = np.random.default_rng(seed)
    planes = [0.5 + 0.5 * np.sin(x * random.uniform(0.05, 0.5) + y * random.uniform(0.05, 0.5) + seed) for _ in range(count)]
    image = np.stack(planes, axis=2)
    return (image * 300 - 100).astype(np.float32) if dtype == "float32" else np.rint(image * np.iinfo(dtype).max).astype(dtype)


def settings(dtype: str, count: int, *, rgb: bool = False) -> ChannelSettings:
    unit = 300.0 if dtype == "float32" else 1.0  # the range of smooth()
    return ChannelSettings(
        count=count,
        dtype=dtype,  # type: ignore[arg-type]
        rgb=("c3", "c1", "c2") if rgb else None,
        groups=(("c1", "c2"),) if count > 2 else (),
        mean=tuple(unit * (0.3 + 0.02 * c) for c in range(count)),
        std=tuple(unit * (0.2 + 0.01 * c) for c in range(count)),
    )


def planned(spec: ViewSpec, images: list[np.ndarray], seed: int = 5) -> ViewPlan:
    n = len(images)
    sizes = np.array([image.shape[:2] for image in images])
    (plan,) = make_plan((spec,), ids=np.arange(n, dtype=np.uint64), epochs=np.zeros(n, dtype=np.int64), sizes=sizes, seed=seed)
    return plan


def run(spec: ViewSpec, images: list[np.ndarray], plan: ViewPlan, *, threads: int = 1) -> torch.Tensor:
    fed = [image.astype(np.float32) for image in images]
    (out,) = Augmenter((spec,), batch_size=len(images), threads=threads).run(fed, [plan])[spec.name]
    return out


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("dtype", "count", "rgb"),
    [
        ("uint16", 8, False),
        ("uint16", 5, True),
        ("uint8", 4, True),
        ("float32", 3, False),
        ("float32", 5, True),
        ("uint16", 1, False),
    ],
)
def test_views_are_numpys(dtype: str, count: int, rgb: bool, interpolation: str) -> None:
    spec = ViewSpec("view", 1, 24, (0.2, 1.0), augment=(EVERYTHING,), interpolation=interpolation)  # type: ignore[arg-type]
    spec = spec.of_channels(settings(dtype, count, rgb=rgb))
    images = [smooth(dtype, count, seed, 61 + seed, 75 - 2 * seed) for seed in range(COUNT)]
    plan = planned(spec, images)
    for name in ("jitter", "gray", "sigma", "solarize", "flip"):
        assert 0 < (plan.arrays[name] > 0).sum() < COUNT, name
    made = run(spec, images, plan).double().numpy()
    assert made.shape == (COUNT, count, 24, 24)
    for row, image in enumerate(images):
        expected = expected_view(image, spec, plan, row)
        close = np.abs(made[row] - expected) < 1e-3
        # Where a value meets the threshold of solarization, rounding decides; there are few such places.
        assert close.mean() > (0.999 if plan.values["solarize"][row] and rgb else 0.9999999), (
            row,
            np.abs(made[row] - expected).max(),
        )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_values_survive_decoding_and_normalization(dtype: str) -> None:
    """Nothing but the normalization: each uint16 value within 1/65535 of the full range, float32 exactly."""
    image = random_image(dtype, 6, 40, 40)
    channels = ChannelSettings(count=6, dtype=dtype)  # type: ignore[arg-type]
    spec = ViewSpec("view", 1, 40, None, augment=(Augment(flip_probability=0.0),)).of_channels(channels)
    (out,) = run(spec, [image], planned(spec, [image]))
    values = out.permute(1, 2, 0).numpy()
    if dtype == "float32":
        assert np.array_equal(values, image)
    else:
        full = np.iinfo(dtype).max
        assert np.abs(values.astype(np.float64) - image / full).max() <= 1e-6
        assert np.array_equal(np.rint(values.astype(np.float64) * full).astype(dtype), image)


def test_normalization_is_per_channel() -> None:
    image = random_image("uint16", 3, 40, 40)
    channels = ChannelSettings(count=3, mean=(0.1, 0.5, 0.9), std=(0.5, 0.1, 2.0))
    spec = ViewSpec("view", 1, 40, None, augment=(Augment(flip_probability=0.0),)).of_channels(channels)
    (out,) = run(spec, [image], planned(spec, [image]))
    expected = (image / 65535 - np.array(channels.mean)) / np.array(channels.std)
    assert np.abs(out.permute(1, 2, 0).double().numpy() - expected).max() < 1e-5


def test_views_do_not_depend_on_the_batch_or_the_number_of_threads() -> None:
    spec = ViewSpec("view", 1, 24, (0.2, 1.0), augment=(EVERYTHING,)).of_channels(settings("uint16", 8))
    images = [smooth("uint16", 8, seed) for seed in range(6)]
    plan = planned(spec, images)
    together = run(spec, images, plan, threads=3)
    for row in range(6):
        (alone,) = run(spec, images[row : row + 1], plan.take([row]))
        assert torch.equal(alone, together[row])


def test_channel_operators_leave_the_draws_of_all_others() -> None:
    plain = ViewSpec(
        "view", 1, 24, (0.2, 1.0), augment=(replace(EVERYTHING, gain=0.0, offset=0.0, noise=0.0, channel_dropout=0.0),)
    )
    images = [smooth("uint8", 3, seed) for seed in range(COUNT)]
    before = planned(plain, images).arrays
    more = replace(plain, augment=(EVERYTHING,)).of_channels(settings("uint8", 3))
    after = planned(more, images).arrays
    assert after.keys() - before.keys() == {
        "group_brightness", "group_contrast", "gain", "offset", "noise_sigma", "noise_seed", "channel_kept"
    }  # fmt: skip
    for name, array in before.items():
        assert np.array_equal(array, after[name]), name


def test_no_two_operators_share_a_draw_and_each_has_its_function() -> None:
    draws = [0, *(draw for operator in (*OPERATORS, *CHANNEL_OPERATORS) for draw in operator.draws)]
    assert len(set(draws)) == len(draws)
    assert [operator.name for operator in OPERATORS] == list(dali._CHANNEL_COLOURS)
    assert [operator.name for operator in CHANNEL_OPERATORS] == ["group_jitter", *dali._CHANNEL_FUNCTIONS]


def test_groups_share_their_factors_and_one_channel_always_stays() -> None:
    spec = ViewSpec("view", 1, 24, (0.2, 1.0), augment=(replace(EVERYTHING, channel_dropout=0.999),))
    spec = spec.of_channels(ChannelSettings(count=4, groups=(("c4", "c1"), ("c2",))))
    values = planned(spec, [smooth("uint16", 4, seed) for seed in range(COUNT)]).values
    for name in ("group_brightness", "group_contrast"):
        assert np.array_equal(values[name][:, 0], values[name][:, 3])
        assert np.unique(values[name][0]).size == 3
    assert (values["channel_kept"].sum(1) >= 1).all() and values["channel_kept"].mean() < 0.5


def test_noise_is_a_function_of_the_sample_alone_and_has_its_strength() -> None:
    spec = ViewSpec("view", 1, 48, None, augment=(Augment(flip_probability=0.0, noise=0.5),)).of_channels(settings("uint16", 4))
    image = smooth("uint16", 4, 1, 48, 48)
    plan = planned(spec, [image, image])
    first, second = run(spec, [image, image], plan)
    quiet = replace(spec, augment=(replace(spec.augment[0], noise=0.0),))
    (clean,) = run(quiet, [image], planned(quiet, [image]))
    for noisy, sigma in ((first, plan.values["noise_sigma"][0]), (second, plan.values["noise_sigma"][1])):
        assert abs(float((noisy - clean).std()) / sigma - 1) < 0.05
    assert not torch.allclose((first - clean) / plan.values["noise_sigma"][0], (second - clean) / plan.values["noise_sigma"][1])
