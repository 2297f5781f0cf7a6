"""Domain shifts of the synthetic scenes: other images, the same classes and layouts, the same on every machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.pack.shifts import SHIFTS
from pipeline.data.pack.synthetic import render, write


@pytest.mark.parametrize("shift", SHIFTS[1:])
def test_a_shift_changes_the_image_and_nothing_else(shift: str) -> None:
    for index in range(5):
        plain, other = render(3, index, 32), render(3, index, 32, shift)  # type: ignore[arg-type]
        assert other.image.dtype == np.uint8 and other.image.shape == plain.image.shape
        assert np.abs(other.image.astype(int) - plain.image.astype(int)).mean() > 2
        assert (other.label, other.captions, other.objects) == (plain.label, plain.captions, plain.objects)
        assert np.array_equal(other.segmentation, plain.segmentation)
        assert np.array_equal(other.image, render(3, index, 32, shift).image)  # type: ignore[arg-type]


def test_without_a_shift_the_images_are_the_old_ones() -> None:
    assert np.array_equal(render(3, 7, 32).image, render(3, 7, 32, "none").image)


def test_a_shifted_data_set_is_written_again_when_the_shift_changes(tmp_path: Path) -> None:
    def digest() -> str:
        return hashlib.sha256((tmp_path / "scenes-train-00000.tar").read_bytes()).hexdigest()

    write(tmp_path, train=4, val=2, size=16)
    first = digest()
    write(tmp_path, train=4, val=2, size=16, shift="microscope")
    second = digest()
    write(tmp_path, train=4, val=2, size=16)
    assert first != second and digest() == first
