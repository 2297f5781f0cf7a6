"""Balanced sampling: equal shares from coarse to fine, as far as samples suffice; equal bytes for any number of threads."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.curation.balance import BalanceOptions, balance, equal_shares, quotas_of
from pipeline.data.curation.dedup import DedupOptions, dedup
from pipeline.data.curation.kmeans import default_levels, hierarchy, kmeans, linked_hierarchy, nearest_centroids
from pipeline.data.curation.outcome import write_outcome
from pipeline.data.curation.vectors import unit
from pipeline.errors import DataError
from tests.helpers import vector_sets


def blobs(sizes: list[int], dim: int = 16, noise: float = 0.05, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    draw = np.random.default_rng(seed)
    centers = unit(draw.normal(size=(len(sizes), dim)))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = draw.permutation(len(labels))
    return unit(centers[labels] + noise * draw.normal(size=(len(labels), dim)))[order], labels[order]


@settings(max_examples=100, deadline=None)
@given(room=st.lists(st.floats(0, 1000), min_size=1, max_size=12), share=st.floats(0, 1))
def test_equal_shares_sum_up_and_nobody_gets_less_than_another_without_being_full(room: list[float], share: float) -> None:
    bounds = np.array(room)
    total = share * bounds.sum()
    shares = equal_shares(bounds, total)
    assert shares.sum() == pytest.approx(total, rel=1e-6, abs=1e-6)
    assert (shares <= bounds + 1e-9).all()
    full = shares >= bounds - 1e-6
    if (~full).any():
        assert np.ptp(shares[~full]) < 1e-6
        assert (shares[full] <= shares[~full].min() + 1e-6).all()


def test_quotas_are_divided_from_coarse_to_fine() -> None:
    sizes = np.array([100, 100, 10, 1000])
    parents = [np.array([0, 0, 0, 1])]
    assert quotas_of(sizes, parents, 200).tolist() == [45, 45, 10, 100]
    assert quotas_of(sizes, [], 200).tolist() == pytest.approx([190 / 3] * 2 + [10] + [190 / 3])
    assert quotas_of(sizes, parents, 200, max_weight=4.0).tolist() == pytest.approx([100 / 3] * 3 + [100])
    with pytest.raises(DataError, match="more than the 1210 samples"):
        quotas_of(sizes, parents, 1211)


def test_kmeans_finds_separate_clusters_and_fills_empty_ones() -> None:
    values, labels = blobs([300, 200, 50, 20, 5])
    centroids = kmeans(values, 5, 3)
    nearest, cosines = nearest_centroids(values, centroids)
    assert all(len(set(nearest[labels == label])) == 1 for label in range(5)) and cosines.min() > 0.9
    same = np.concatenate([values[:1]] * 30 + [values[1:9]])
    assert len(set(nearest_centroids(same, kmeans(same, 9, 0))[0].tolist())) == 9
    with pytest.raises(DataError, match="fewer than 39 clusters"):
        kmeans(same, 39, 0)


def test_kmeans_gives_equal_bytes_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.curation.kmeans.ROWS", 64)
    values, _ = blobs([300, 200, 50], noise=0.5)
    results = [kmeans(values, 12, 1, workers=workers).tobytes() for workers in (1, 2, 7)]
    assert len(set(results)) == 1
    assert kmeans(values, 12, 2).tobytes() != results[0]


def test_each_level_of_a_hierarchy_clusters_the_one_below() -> None:
    values, _ = blobs([60] * 12)
    parents = hierarchy(values, [24, 12, 3], 0)
    assert [len(parent) for parent in parents] == [720, 24, 12]
    assert [len(set(parent.tolist())) for parent in parents] == [24, 12, 3]


def test_levels_of_linkage_are_states_of_one_tree() -> None:
    values, labels = blobs([40, 20, 10, 5], noise=0.1)
    fine, coarse = linked_hierarchy(values, (9, 4))
    assert (len(fine), len(coarse)) == (75, 9) and (len(set(fine.tolist())), len(set(coarse.tolist()))) == (9, 4)
    assert {tuple(sorted(set(labels[coarse[fine] == one].tolist()))) for one in range(4)} == {(0,), (1,), (2,), (3,)}
    direct = linked_hierarchy(values, (4,))[0]
    assert len({*zip(direct.tolist(), coarse[fine].tolist(), strict=True)}) == 4
    assert [part.tolist() for part in linked_hierarchy(values[:1], (1, 1))] == [[0], [0]]
    assert linked_hierarchy(values, ()) == []


@pytest.mark.parametrize("coarse", ["auto", "kmeans"])
@pytest.mark.parametrize("mode", ["subset", "weights"])
def test_a_skew_of_fifty_is_balanced(tmp_path: Path, mode: str, coarse: str) -> None:
    values, labels = blobs([500, 250, 100, 50, 10], noise=0.1)
    vectors = vector_sets.make(tmp_path / "e", values, labels=labels)
    options = BalanceOptions((30, 5), 150, mode, 3.0, coarse=coarse)  # type: ignore[arg-type]
    outcome = balance(vectors, options, tmp_path / "w", progress=vector_sets.quiet)
    assert outcome is not None
    classes = np.bincount(labels, weights=outcome.weights)
    assert classes.max() / classes.min() < 1.6
    assert outcome.weights.sum() == pytest.approx(150, abs=2)
    assert (outcome.weights > 0).sum() == (910 if mode == "weights" else outcome.counts["kept"])
    assert outcome.weights.max() <= 3.0 + 1e-9
    assert any(note.startswith("largest to smallest of 5 classes: 50.0 before") for note in outcome.notes)


def test_threads_parts_and_repeats_change_no_byte(tmp_path: Path) -> None:
    values, labels = blobs([300, 100, 30], noise=0.3)
    vectors = vector_sets.make(tmp_path / "e", values, labels=labels, shards=5)
    options = BalanceOptions((20, 3), 90, seed=4)
    files = []
    for name, workers in (("a", 1), ("b", 4), ("parts", 2), ("a", 3)):
        if name == "parts":
            for part in (2, 1):
                assert balance(vectors, options, tmp_path / name, part=(part, 2), progress=vector_sets.quiet) is None
        outcome = balance(vectors, options, tmp_path / name, workers=workers, progress=vector_sets.quiet)
        assert outcome is not None
        write_outcome(tmp_path / "s.parquet", outcome, vectors, {})
        files.append((tmp_path / "s.parquet").read_bytes())
    assert len(set(files)) == 1


def test_levels_must_descend(tmp_path: Path) -> None:
    vectors = vector_sets.make(tmp_path / "e", blobs([9])[0])
    with pytest.raises(DataError, match=r"levels \[3, 5\] must descend"):
        balance(vectors, BalanceOptions((3, 5), 5), tmp_path / "w", progress=vector_sets.quiet)
    with pytest.raises(DataError, match="9 embeddings are fewer than 20 clusters"):
        balance(vectors, BalanceOptions((20,), 5), tmp_path / "w", progress=vector_sets.quiet)
    with pytest.raises(DataError, match="9000 clusters are more than 8192"):
        balance(vectors, BalanceOptions((9000, 5), 5, coarse="linkage"), tmp_path / "w", progress=vector_sets.quiet)


@given(total=st.integers(1, 10**10))
def test_default_levels_descend(total: int) -> None:
    levels = default_levels(total)
    assert 1 <= levels[0] <= total and all(a > b > 1 for a, b in itertools.pairwise(levels))


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=2, max_size=60),
    groups=st.integers(1, 6),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
def test_whole_quotas_keep_the_share_of_every_level(sizes: list[int], groups: int, share: float, seed: int) -> None:
    amounts = np.array(sizes)
    target = int(share * amounts.sum())
    parent = np.arange(len(sizes)) % groups
    exact = quotas_of(amounts, [parent], target)
    whole = quotas_of(amounts, [parent], target, rounding_seed=seed)
    assert np.array_equal(whole, np.floor(whole)) and (whole <= amounts).all() and whole.sum() == target
    for group in range(groups):
        assert abs(whole[parent == group].sum() - exact[parent == group].sum()) < 1 + 1e-6
    assert (np.abs(whole - exact) < 2 + 1e-6).all()


def test_a_class_with_more_clusters_than_its_share_of_samples_keeps_its_share(tmp_path: Path) -> None:
    values, labels = blobs([900, 60], noise=0.2)
    vectors = vector_sets.make(tmp_path / "e", values, labels=labels)
    outcome = balance(vectors, BalanceOptions((200, 2), 40), tmp_path / "w", progress=vector_sets.quiet)
    assert outcome is not None
    assert np.bincount(labels, weights=outcome.weights).tolist() == [20, 20]


def test_embeddings_of_zeros_are_counted(tmp_path: Path) -> None:
    values, _ = blobs([30, 10])
    values[[3, 17]] = 0
    vectors = vector_sets.make(tmp_path / "e", values)
    balanced = balance(vectors, BalanceOptions((4,), 20), tmp_path / "w", progress=vector_sets.quiet)
    unique = dedup(vectors, DedupOptions(0.999), tmp_path / "v", progress=vector_sets.quiet)
    assert balanced is not None and unique is not None
    for outcome in (balanced, unique):
        assert any(note.startswith("2 embeddings are zero") for note in outcome.notes), outcome.notes
