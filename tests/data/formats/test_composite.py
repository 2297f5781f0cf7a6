"""What people are shown of images of any channels: stretched by percentiles, chosen channels or principal components."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.formats.composite import composite, default_shown
from tests.helpers.channel_images import random_image


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_image_becomes_colours(dtype: str, count: int) -> None:
    image = random_image(dtype, count)
    for shown in (default_shown(count), "pca"):
        colours = composite(image, shown)  # type: ignore[arg-type]
        assert colours.shape == (24, 30, 3) and colours.dtype == np.uint8
        assert colours.min() == 0 and colours.max() == 255


def test_chosen_channels_are_stretched_each_by_its_own_percentiles() -> None:
    ramp = np.linspace(0, 1, 10_000).reshape(100, 100)
    image = np.stack([ramp * 7 - 3, ramp * 1e6, -ramp, ramp * 0], axis=2)
    colours = composite(image, (2, 0, 1)).astype(int)
    assert np.array_equal(colours[:, :, 1], colours[:, :, 2]) and np.abs(colours[:, :, 0] + colours[:, :, 1] - 255).max() <= 1
    assert (colours[:, :, 1] == 0).mean() == pytest.approx(0.01, abs=0.003)
    assert not composite(image, (3,)).any(), "a uniform channel is black"


def test_the_first_component_is_what_differs_most() -> None:
    wave = np.sin(np.linspace(0, 20, 2500)).reshape(50, 50)
    noise = np.random.default_rng(0).normal(size=(50, 50, 6))
    image = wave[:, :, None] * np.array([1, 0.9, 1.1, 1, 1, 1]) * 10 + noise
    red = composite(image, "pca")[:, :, 0].astype(float)
    assert abs(np.corrcoef(red.ravel(), wave.ravel())[0, 1]) > 0.95
