"""Masks: exact counts, block-likeness, and that a mask depends on nothing but its own key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.augment.masks import block_masks, mask_counts
from pipeline.data.augment.views import MaskSpec

SPEC = MaskSpec(patch=16)


def ids(n: int) -> NDArray[np.uint64]:
    return np.arange(n, dtype=np.uint64) * np.uint64(2**32 + 17)


@pytest.mark.parametrize(
    ("crops", "patches", "total"), [(128, 196, 3771), (64, 256, 2496), (24, 256, 967), (8, 196, 273), (4, 16, 12)]
)
def test_the_global_batch_hides_the_number_of_the_reference(crops: int, patches: int, total: int) -> None:
    for step in range(3):
        assert mask_counts(crops, patches, SPEC, 5, step).sum() == total


@pytest.mark.parametrize(("crops", "patches", "counts"), [(8, 196, [39, 58, 78, 98]), (4, 16, [4, 8])])
def test_ratios_are_spread_evenly_over_the_masked_half(crops: int, patches: int, counts: list[int]) -> None:
    assert sorted(mask_counts(crops, patches, SPEC, 1)) == [0] * (crops - len(counts)) + counts


def test_who_is_masked_changes_with_the_key() -> None:
    drawn = {tuple(mask_counts(8, 196, SPEC, 0, step)) for step in range(20)}
    assert len(drawn) > 15
    assert tuple(mask_counts(8, 196, SPEC, 0, 3)) == tuple(mask_counts(8, 196, SPEC, 0, 3))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.data())
def test_counts_are_hit_exactly_on_any_grid(height: int, width: int, data: st.DataObject) -> None:
    counts = np.array(data.draw(st.lists(st.integers(0, height * width), min_size=1, max_size=9)), dtype=np.int64)
    masks = block_masks(counts, height, width, ids(len(counts)), data.draw(st.integers(0, 2**40)))
    assert masks.shape == (len(counts), height * width)
    assert masks.dtype == np.bool_
    assert (masks.sum(1) == counts).all()


@settings(max_examples=30, deadline=None)
@given(st.permutations(list(range(12))), st.integers(1, 12))
def test_a_mask_does_not_depend_on_its_neighbours_in_the_batch(order: list[int], size: int) -> None:
    counts = np.arange(12, dtype=np.int64) * 17  # the fullest need many single patches
    whole = block_masks(counts, 14, 14, ids(12), 7, 1)
    chosen = np.array(order[:size])
    assert (block_masks(counts[chosen], 14, 14, ids(12)[chosen], 7, 1) == whole[chosen]).all()


def test_sample_and_key_both_change_the_mask() -> None:
    counts = np.full(2, 60)
    first, second = block_masks(counts, 14, 14, ids(2), 0, 1)
    assert (first != second).any()
    assert (block_masks(counts, 14, 14, ids(2), 0, 2)[0] != first).any()


def _neighbours(masks: NDArray[np.bool_], side: int) -> float:
    grid = masks.reshape(-1, side, side)
    pairs = (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()
    return float(2 * pairs / grid.sum())


def test_masks_are_blocks_not_salt() -> None:
    counts = np.full(200, 58)
    blocks = block_masks(counts, 14, 14, ids(200), 3)
    generator = np.random.default_rng(0)
    salt = np.zeros_like(blocks)
    for row in salt:
        row[generator.choice(196, 58, replace=False)] = True
    assert _neighbours(salt, 14) < 1.3
    assert _neighbours(blocks, 14) > 2.2


def test_every_place_is_hidden_at_times_and_no_side_is_favoured() -> None:
    share = block_masks(np.full(4000, 58), 14, 14, ids(4000), 3).mean(0).reshape(14, 14)
    assert share.min() > 0.02
    assert share.max() < 0.6
    for mirrored in (share[::-1], share[:, ::-1], share.T):
        assert np.abs(share - mirrored).max() < 0.05


def test_an_unmasked_batch_is_all_false() -> None:
    assert not block_masks(np.zeros(5, dtype=np.int64), 14, 14, ids(5), 1).any()
    assert mask_counts(6, 16, MaskSpec(patch=4, probability=0.0), 1).sum() == 0
