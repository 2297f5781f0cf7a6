"""The hue on a CPU has the pixels of the DALI graph that a GPU runs, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from pipeline.data.augment import hue
from pipeline.data.augment.dali_hue import turn_hue
from pipeline.data.augment.hue import turn_hues

TURNS = np.array([-0.5, -1 / 3, -0.1, -1e-7, 0.0, 1 / 12, 0.1, 1 / 6, 0.25, 0.4999, 0.5], np.float32)


def colours() -> NDArray[np.uint8]:
    """Every third level of each channel, and pixels whose channels are equal or differ by one: ``[h, w, 3]``."""
    levels = np.arange(0, 256, 3)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    gray = np.arange(256).repeat(27).reshape(-1, 1)
    near = gray + np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), axis=-1).reshape(-1, 3)[np.arange(len(gray)) % 27]
    pixels = np.concatenate([lattice, near.clip(0, 255)]).astype(np.uint8)
    return pixels[: len(pixels) // 100 * 100].reshape(-1, 100, 3)


def by_dali(image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The image with its hue turned by each of ``TURNS``, by the operators of a GPU's graph."""

    @pipeline_def(batch_size=len(TURNS), num_threads=1, device_id=None)
    def graph() -> Any:
        images = fn.external_source(name="images", layout="HWC", ndim=3, dtype=types.UINT8, batch=True)
        return turn_hue(images, fn.external_source(name="turns", ndim=0, dtype=types.FLOAT, batch=True))

    pipeline = graph()
    pipeline.build()
    pipeline.feed_input("images", [image] * len(TURNS))
    pipeline.feed_input("turns", TURNS)
    (out,) = pipeline.run()
    return [np.array(out[index]) for index in range(len(TURNS))]


@pytest.mark.slow
def test_the_pixels_are_those_of_the_graph() -> None:
    image = colours()
    turned = turn_hues([image] * len(TURNS), list(TURNS))
    for turn, ours, theirs in zip(TURNS, turned, by_dali(image), strict=True):
        assert np.array_equal(ours, theirs), turn
    assert any((ours != image).any() for ours in turned)


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_and_threads_change_nothing(threads: int) -> None:
    images = [colours()[:n] for n in (3, 1, 40)]
    expected = turn_hues(images, [np.float32(0.2)] * 3)
    with ThreadPoolExecutor(threads) as pool, mock.patch.object(hue, "_BLOCK", 37):
        turned = turn_hues(images, [np.float32(0.2)] * 3, pool)
    for ours, theirs, image in zip(turned, expected, images, strict=True):
        assert np.array_equal(ours, theirs) and ours.shape == image.shape and ours.dtype == np.uint8


def test_a_third_of_a_turn_exchanges_the_primaries_and_none_changes_nothing() -> None:
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]]], np.uint8)
    third, none = turn_hues([primaries] * 2, [np.float32(1 / 3), np.float32(0)])
    assert third.tolist() == [[[0, 255, 0], [0, 0, 255], [255, 0, 0], [90, 90, 90]]]
    assert np.array_equal(none, primaries)
