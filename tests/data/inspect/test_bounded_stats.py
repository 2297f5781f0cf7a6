"""Distributions and duplicates of a data set are those of all its values at once, whatever is held at a time."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.inspect import duplicates
from pipeline.data.inspect.tally import Tally, pairs, percentiles, rounded, rounded_pairs

SHARES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
VALUES = st.lists(st.lists(st.integers(0, 40), max_size=9), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.integers(1, 8))
def test_a_tally_counts_as_numpy_does_and_has_its_percentiles(parts: list[list[int]], most: int) -> None:
    tally = Tally(None, most)
    for part in parts:
        tally.add(np.array(part, np.int32))
    every = np.array([value for part in parts for value in part], np.int64)
    values, counts = tally.result()
    expected = np.unique(every, return_counts=True)
    assert np.array_equal(values, expected[0]) and np.array_equal(counts, expected[1])
    if len(every):
        shuffled = np.random.default_rng(0).permutation(len(values))
        own = percentiles(values[shuffled].astype(float), counts[shuffled], SHARES)
        assert own == np.percentile(every, SHARES, method="nearest").tolist()


def test_many_distinct_values_are_rounded_just_enough_and_none_is_lost() -> None:
    every = np.random.default_rng(0).integers(0, 1 << 30, 20_000)
    tally = Tally(most=4000)
    for part in np.split(every, 40):
        tally.add(part)
    values, counts = tally.result()
    assert tally.digits is not None and 8 < tally.digits < 12 and 1000 < len(values) <= 4000 and counts.sum() == 20_000
    own = percentiles(values.astype(float), counts, SHARES)
    assert own == pytest.approx(np.percentile(every, SHARES, method="nearest"), rel=2.0 ** (1 - tally.digits))
    both = pairs(every[:100], every[100:200])
    assert np.array_equal(rounded_pairs(both, 5), pairs(rounded(every[:100], 5), rounded(every[100:200], 5)))
    assert np.array_equal(rounded(np.arange(4096), 12), np.arange(4096))


def columns(rows: list[tuple[int, int, int]]) -> dict[str, Any]:
    return {
        "crc32": np.array([crc for crc, _, _ in rows], np.uint32),
        "image_size": np.array([7] * len(rows), np.int64),
        "width": np.array([width for _, width, _ in rows], np.int32),
        "height": np.array([5] * len(rows), np.int32),
        "label": np.array([label for _, _, label in rows], np.int32),
    }


SHARDS = st.lists(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(-1, 2)), max_size=8), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(SHARDS, st.integers(1, 40))
def test_duplicates_are_the_same_however_many_parts_they_are_found_in(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[tuple[int, int, int]]], part: int
) -> None:
    folder: Path = tmp_path_factory.getbasetemp()
    places: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for row, (crc, width, label) in enumerate(sample for shard in shards for sample in shard):
        places[crc, width].append((row, label))
    groups = sorted(group for group in places.values() if len(group) > 1)
    found = duplicates.find(map(columns, shards), sum(map(len, shards)), folder, part=part)
    assert (found.count, found.superfluous) == (len(groups), sum(len(group) - 1 for group in groups))
    assert found.labels_differ == sum(len({label for _, label in group}) > 1 for group in groups)
    assert found.examples == tuple(tuple(row for row, _ in group[:4]) for group in groups[:5])
    assert not list(folder.glob(".duplicates-*"))
