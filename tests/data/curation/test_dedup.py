"""Near-duplicates: all pairs above the threshold are found, in groups, whatever the clusters, threads and interruptions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.curation.dedup import DedupOptions, dedup
from pipeline.data.curation.near_duplicates import Quality, best_of_groups, compare, components, same_content
from pipeline.data.curation.outcome import write_outcome
from pipeline.data.curation.vectors import Vectors, unit
from pipeline.data.selections.file import Selection
from pipeline.errors import DataError
from tests.helpers import vector_sets


def scattered(n: int, dim: int = 24, seed: int = 0) -> NDArray[np.float32]:
    return unit(np.random.default_rng(seed).normal(size=(n, dim)))


def with_copies(n: int, copies: int, noise: float, seed: int = 0) -> NDArray[np.float32]:
    """``n`` vectors, of which the first third has some near copies after them."""
    base, draw = scattered(n, seed=seed), np.random.default_rng(seed + 1)
    third = base[: n // 3]
    return np.concatenate([base, *(unit(third + noise * draw.normal(size=third.shape)) for _ in range(copies))])


def groups_by_all_pairs(vectors: NDArray[np.float32], threshold: float) -> NDArray[np.int64]:
    a, b = np.nonzero(vectors @ vectors.T >= threshold)
    return components(len(vectors), a, b)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_components_are_those_of_a_search(n: int, seed: int, data: st.DataObject) -> None:
    edges = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40))
    a, b = (np.array([edge[side] for edge in edges], dtype=np.int64) for side in (0, 1))
    label = np.arange(n)
    for _ in range(n):
        for left, right in edges:
            label[left] = label[right] = min(label[left], label[right])
    assert components(n, a, b).tolist() == label.tolist()


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.99])
def test_comparing_in_blocks_connects_what_all_pairs_connect(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.curation.near_duplicates._BLOCK", 37)
    monkeypatch.setattr("pipeline.data.curation.near_duplicates._MOST_EDGES", 50)
    vectors = with_copies(120, 3, 0.05)
    a, b, neighbors, cosines = compare(vectors, threshold)
    assert components(len(vectors), a, b).tolist() == groups_by_all_pairs(vectors, threshold).tolist()
    full = vectors @ vectors.T
    np.fill_diagonal(full, -2)
    assert np.allclose(cosines, full.max(axis=1), atol=1e-6)
    assert np.allclose(full[np.arange(len(full)), neighbors], full.max(axis=1), atol=1e-6)


def test_equal_vectors_are_duplicates_at_a_threshold_of_one(tmp_path: Path) -> None:
    values = scattered(300, dim=384)
    vectors = vector_sets.make(tmp_path / "e", np.concatenate([values, values]), shards=2)
    other = vector_sets.make(tmp_path / "o", values, shards=1, contents=np.arange(1000, 1300))
    outcome = dedup(vectors, DedupOptions(threshold=1.0), tmp_path / "w", progress=vector_sets.quiet)
    assert outcome is not None and np.flatnonzero(outcome.weights).tolist() == list(range(300))
    mixed = vector_sets.make(tmp_path / "m", np.concatenate([values, scattered(5, dim=384, seed=1)]), shards=1)
    options = DedupOptions(against_threshold=1.0, within=False)
    left = dedup(mixed, options, tmp_path / "v", against=[other], progress=vector_sets.quiet)
    assert left is not None and np.flatnonzero(left.weights).tolist() == list(range(300, 305))


def test_equal_contents_are_linked_to_the_first() -> None:
    digests = np.array([[n] * 16 for n in (5, 3, 5, 5, 9, 3)], dtype=np.uint8)
    a, b = same_content(digests)
    assert sorted(zip(a.tolist(), b.tolist(), strict=True)) == [(2, 0), (3, 0), (5, 1)]


def test_of_a_group_the_captioned_then_the_largest_then_the_least_compressed_is_kept() -> None:
    groups = np.array([0, 0, 0, 3, 3, 5, 6, 6])
    captioned = np.array([0, 1, 0, 0, 0, 0, 0, 0], dtype=bool)
    pixels = np.array([900, 100, 900, 64, 256, 1, 64, 64])
    size = np.array([1, 1, 1, 1, 1, 1, 10, 20])
    assert np.flatnonzero(best_of_groups(groups, Quality(captioned, pixels, size))).tolist() == [1, 4, 5, 7]
    nothing = np.zeros(0, dtype=np.int64)
    assert not len(best_of_groups(nothing, Quality(nothing.astype(bool), nothing, nothing)))


@pytest.mark.parametrize("clusters", [1, 9])
def test_planted_copies_are_removed_and_nothing_else(tmp_path: Path, clusters: int) -> None:
    values = with_copies(600, 2, 0.02)
    sides = np.full(1000, 32)
    sides[700:750] = 64  # copies that are larger than their originals
    vectors = vector_sets.make(tmp_path / "e", values, sides=sides)
    options = DedupOptions(threshold=0.95, clusters=clusters)
    outcome = dedup(vectors, options, tmp_path / "w", progress=vector_sets.quiet)
    assert outcome is not None and outcome.counts == {"exact_duplicate": 0, "near_duplicate": 400, "kept": 600}
    kept = np.flatnonzero(outcome.weights)
    expected = np.concatenate([np.arange(100), np.arange(150, 600), np.arange(700, 750)])
    assert kept.tolist() == expected.tolist()


def test_equal_bytes_are_duplicates_whatever_their_vectors_and_are_counted_apart(tmp_path: Path) -> None:
    contents = np.array([0, 1, 2, 0, 4, 2])
    vectors = vector_sets.make(tmp_path / "e", scattered(6), contents=contents, shards=2)
    outcome = dedup(vectors, DedupOptions(), tmp_path / "w", progress=vector_sets.quiet)
    assert outcome is not None and outcome.counts == {"exact_duplicate": 2, "near_duplicate": 0, "kept": 4}
    assert np.flatnonzero(outcome.weights).tolist() == [0, 1, 2, 4]


def test_duplicates_of_a_sample_near_another_set_are_still_removed(tmp_path: Path) -> None:
    axes = np.eye(8, dtype=np.float32)
    leaked = 0.97 * axes[0] + 0.2431 * axes[1]
    others = [0.93 * axes[0] + 0.3676 * axes[1], 0.93 * axes[0] + 0.3676 * axes[1] + 0.05 * axes[3]]
    vectors = vector_sets.make(tmp_path / "e", unit(np.stack([leaked, *others, axes[5]])), shards=1)
    other = vector_sets.make(tmp_path / "o", axes[:1], shards=1, contents=np.array([99]))
    outcome = dedup(vectors, DedupOptions(), tmp_path / "w", against=[other], progress=vector_sets.quiet)
    assert outcome is not None and outcome.weights.tolist() == [0, 1, 0, 1]
    assert outcome.counts == {"near_other_set": 1, "exact_duplicate": 0, "near_duplicate": 1, "kept": 2}


def test_what_is_near_another_set_is_removed(tmp_path: Path) -> None:
    base = scattered(50)
    evaluation = unit(base[:5] + 0.01 * scattered(5, seed=5))
    vectors = vector_sets.make(tmp_path / "e", base, contents=np.concatenate([np.arange(49), [1000]]))
    other = vector_sets.make(
        tmp_path / "o", np.concatenate([evaluation, scattered(2, seed=9)]), contents=np.arange(994, 1001), shards=1
    )
    outcome = dedup(vectors, DedupOptions(), tmp_path / "w", against=[other], progress=vector_sets.quiet)
    assert outcome is not None and outcome.counts["near_other_set"] == 6
    assert np.flatnonzero(outcome.weights == 0).tolist() == [0, 1, 2, 3, 4, 49]
    assert any("6 samples are near" in note and "1 of them with equal bytes" in note for note in outcome.notes)


def test_sets_of_other_networks_are_refused(tmp_path: Path) -> None:
    vectors = vector_sets.make(tmp_path / "e", scattered(9))
    other = vector_sets.make(tmp_path / "o", scattered(9), weights="b" * 64)
    with pytest.raises(DataError, match=r"differ from those of .* in weights"):
        dedup(vectors, DedupOptions(), tmp_path / "w", against=[other], progress=vector_sets.quiet)


def _file(vectors: Vectors, work: Path, out: Path, **how: object) -> bytes:
    outcome = dedup(vectors, DedupOptions(clusters=7), work, progress=vector_sets.quiet, **how)  # type: ignore[arg-type]
    assert outcome is not None
    write_outcome(out, outcome, vectors, {"command": "a test"})
    return out.read_bytes()


def test_threads_parts_and_interruptions_change_no_byte(tmp_path: Path) -> None:
    vectors = vector_sets.make(tmp_path / "e", with_copies(900, 1, 0.03), shards=6)
    expected = _file(vectors, tmp_path / "w1", tmp_path / "1.parquet", workers=1)
    assert _file(vectors, tmp_path / "w5", tmp_path / "5.parquet", workers=5) == expected
    assert _file(vectors, tmp_path / "w5", tmp_path / "again.parquet", workers=2) == expected
    for _ in range(2):  # the second time, all samples have their clusters
        for part in (2, 1, 3):
            assert dedup(vectors, DedupOptions(clusters=7), tmp_path / "w3", part=(part, 3), progress=vector_sets.quiet) is None
    assert len(list((tmp_path / "w3" / "links").iterdir())) == 7
    assert _file(vectors, tmp_path / "w3", tmp_path / "3.parquet") == expected

    class Killed(Exception):
        pass

    done = 0

    def until(limit: int):  # type: ignore[no-untyped-def]
        def progress(stage: str, own: int, total: int) -> None:
            nonlocal done
            done += 1
            if done == limit:
                raise Killed

        return progress

    dedup(vectors, DedupOptions(clusters=7), tmp_path / "all", progress=until(-1), workers=2)
    for limit in (3, done - 13, done - 8, done - 7, done - 3, done):
        done = 0
        with pytest.raises(Killed):
            dedup(vectors, DedupOptions(clusters=7), tmp_path / f"k{limit}", progress=until(limit), workers=2)
        assert _file(vectors, tmp_path / f"k{limit}", tmp_path / "k.parquet", workers=3) == expected


def test_intermediate_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    vectors = vector_sets.make(tmp_path / "e", scattered(30))
    dedup(vectors, DedupOptions(), tmp_path / "w", progress=vector_sets.quiet)
    with pytest.raises(DataError, match=r"other data or settings \(threshold\)"):
        dedup(vectors, DedupOptions(threshold=0.9), tmp_path / "w", progress=vector_sets.quiet)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".work.json.1234.0abc.tmp").write_text("{")
    dedup(vectors, DedupOptions(), tmp_path / "killed", progress=vector_sets.quiet)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="not empty"):
        dedup(vectors, DedupOptions(), tmp_path / "full", progress=vector_sets.quiet)


def test_the_selection_says_how_it_was_made(tmp_path: Path) -> None:
    vectors = vector_sets.make(tmp_path / "e", with_copies(30, 1, 0.01))
    _file(vectors, tmp_path / "w", tmp_path / "s.parquet")
    info = Selection(tmp_path / "s.parquet").info
    assert info.fingerprint == vector_sets.FINGERPRINT and info.samples == 30 and info.total == 40
    assert info.made["command"] == "a test" and info.counts["near_duplicate"] == 10


def test_more_rows_than_the_files_can_hold_are_refused_before_memory_is_allocated(tmp_path: Path) -> None:
    vector_sets.make(tmp_path / "e", scattered(9), shards=1)
    path = tmp_path / "e" / "embeddings.json"
    content = json.loads(path.read_text())
    rows = {"samples": 1 << 32, "rows": 1 << 32}
    content["shards"][0] |= rows
    content["counts"] |= {**rows, "embedded": 1 << 32}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"4294967296 rows in \d+ bytes"):
        Vectors.of(vector_sets.opened(tmp_path / "e"))
    content["shards"][0]["bytes"] = 1 << 45
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="bytes, and 35184372088832 in the description"):
        Vectors.of(vector_sets.opened(tmp_path / "e"))


def test_embeddings_of_patches_are_refused(tmp_path: Path) -> None:
    class Patches:
        directory = tmp_path
        spec = type("Spec", (), {"patches": 4})

    with pytest.raises(DataError, match="embeddings of patches"):
        Vectors.of(Patches())  # type: ignore[arg-type]
