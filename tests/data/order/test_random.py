"""Counter-based randomness: Philox by its published vectors, and draws that depend on nothing but their key."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import random
from pipeline.data.order.random import PERMUTED, choose, mix, permutation, philox, uniforms

IDS = np.array([0, 1, 7, 2**32 + 1, 2**63 + 5], dtype=np.uint64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    assert philox(np.array([counter], dtype=np.uint32), key).tolist() == [expected]


def test_the_numbers_are_uniform_and_uncorrelated() -> None:
    draws = uniforms(np.arange(50_000, dtype=np.uint64), 6, 3, 1)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 3000) ** 2 / 3000).sum()
    assert 60 < chi_square < 145  # 99 degrees of freedom: mean 99, sd 14
    assert np.abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.02
    assert np.abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.02


@given(rows=st.lists(st.integers(0, len(IDS) - 1), max_size=8), count=st.integers(1, 9))
def test_a_draw_does_not_depend_on_the_batch_it_is_made_in(rows: list[int], count: int) -> None:
    alone = np.array([uniforms(IDS[[row]], 9, 5, 2)[0, :count] for row in rows]).reshape(len(rows), count)
    assert np.array_equal(uniforms(IDS[rows], count, 5, 2), alone)


def test_every_part_of_the_key_matters() -> None:
    draws = [
        uniforms(np.array([number], dtype=np.uint64), 4, seed, stream, epochs=epoch).tobytes()
        for number in (0, 1, 2**32)
        for seed in (0, 1, 2**32)
        for stream in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(draws)) == len(draws)
    assert mix(1, 2) != mix(2, 1)
    assert mix(1) != mix(1, 0)


def test_epochs_may_differ_inside_a_batch() -> None:
    epochs = np.array([0, 3, 3, 1, 0])
    mixed = uniforms(IDS, 5, 9, epochs=epochs)
    for row, epoch in enumerate(epochs.tolist()):
        assert np.array_equal(mixed[row], uniforms(IDS, 5, 9, epochs=epoch)[row])


def test_numpy_integers_are_keys_like_any_other() -> None:
    for kind in (np.int64, np.uint64, np.int32, np.uint8):
        assert mix(kind(7), kind(200)) == mix(7, 200)
        assert np.array_equal(uniforms(IDS, 3, kind(7)), uniforms(IDS, 3, 7))
        assert np.array_equal(permutation(9, kind(7)), permutation(9, 7))


def test_draws_never_change_between_versions() -> None:
    assert mix(1, 2, 3) == (4259537587, 3497215824)
    assert uniforms(IDS[:2], 2, 1, 2, epochs=3).tolist() == [
        [0.9754832668695599, 0.9541482806671411],
        [0.6459346930496395, 0.17218120209872723],
    ]
    assert permutation(8, 1, 2).tolist() == [4, 2, 5, 7, 0, 6, 1, 3]
    assert permutation(8, 1, 2).dtype == np.int64
    large = permutation(1 << 18, 1, 2)  # some draws have equal upper halves
    assert hashlib.sha256(large.astype("<i8").tobytes()).hexdigest()[:16] == "ddc829867de53ed6"


@given(n=st.integers(0, 400), key=st.integers(0, 2**64 - 1))
def test_a_permutation_holds_everything_once(n: int, key: int) -> None:
    assert sorted(permutation(n, key).tolist()) == list(range(n))


def test_every_place_is_equally_likely() -> None:
    places = np.stack([permutation(5, 1, key) for key in range(1000)])
    counts = np.stack([np.bincount(places[:, place], minlength=5) for place in range(5)])
    assert np.abs(counts - 200).max() < 65  # sd 13


def test_few_of_a_permutable_set_are_the_first_of_its_permutation() -> None:
    assert choose(1000, 30, 5, 6).tolist() == sorted(permutation(1000, 5, 6)[:30].tolist())
    assert choose(7, 9, 1).tolist() == list(range(7))
    assert choose(0, 3, 1).tolist() == choose(5, 0, 1).tolist() == []


@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 2**40))
def test_beyond_it_numbers_are_distinct_below_the_bound_and_of_their_key(n: int, count: int, key: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "PERMUTED", 0)
        chosen = choose(n, count, key).tolist()
        assert len(set(chosen)) == len(chosen) == min(n, count) and chosen == sorted(chosen)
        assert not chosen or (chosen[0] >= 0 and chosen[-1] < n)
        assert chosen == choose(n, count, key).tolist()


def test_numbers_of_a_huge_set_are_spread_evenly_and_cost_only_themselves() -> None:
    n = 5_000_000_000
    tracemalloc.start()
    chosen = choose(n, 20_000, 3, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000 * 400
    counts = np.bincount(chosen // (n // 20), minlength=20)[:20]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45.3  # chi-squared, 19 degrees of freedom, p = 0.0006
    other = choose(n, 20_000, 3, 5)
    assert len(np.intersect1d(chosen, other)) < 5
    assert choose(PERMUTED + 1, 5, 9).tolist() != sorted(permutation(PERMUTED + 1, 9)[:5].tolist())
