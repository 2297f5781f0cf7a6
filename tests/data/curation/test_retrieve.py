"""Retrieval: exactly the nearest images of each query, or images of the queries' clusters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.curation import retrieve as module
from pipeline.data.curation.retrieve import RetrieveOptions, retrieve
from pipeline.data.curation.vectors import unit
from tests.data.curation.test_balance import blobs
from tests.helpers import vector_sets

Neighbors = tuple[NDArray[np.int64], NDArray[np.float32]]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_nearest_images_are_those_of_all_pairs(tmp_path: Path, workers: int) -> None:
    draw = np.random.default_rng(0)
    pool, asked = (unit(draw.normal(size=(n, 12))).astype(np.float16) for n in (203, 11))
    vectors = vector_sets.make(tmp_path / "e", pool, shards=7)
    queries = vector_sets.make(tmp_path / "q", asked, shards=2)
    outcome = retrieve(vectors, queries, RetrieveOptions(k=5), tmp_path / "w", workers=workers, progress=vector_sets.quiet)
    cosines = unit(asked) @ unit(pool).T
    assert np.flatnonzero(outcome.weights).tolist() == sorted(set(np.argsort(-cosines, axis=1)[:, :5].reshape(-1).tolist()))
    floor = float(np.median(cosines.max(axis=1)))
    few = retrieve(
        vectors, queries, RetrieveOptions(k=5, min_cosine=floor), tmp_path / "w", workers=workers, progress=vector_sets.quiet
    )
    assert few.counts["kept"] < outcome.counts["kept"] and any("queries have no image" in note for note in few.notes)


def test_blocks_of_queries_and_parts_of_shards_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    pool, queried = (unit(draw.normal(size=(n, 12))).astype(np.float16) for n in (400, 60))
    vectors, queries = vector_sets.make(tmp_path / "e", pool, shards=40), vector_sets.make(tmp_path / "q", queried, shards=3)
    at_once = retrieve(vectors, queries, RetrieveOptions(k=3), tmp_path / "w", progress=vector_sets.quiet)
    monkeypatch.setattr("pipeline.data.curation.retrieve._HELD", 21)
    seen: list[tuple[int, int]] = []
    by_blocks = retrieve(
        vectors, queries, RetrieveOptions(k=3), tmp_path / "v", progress=lambda _, done, total: seen.append((done, total))
    )
    assert np.array_equal(at_once.weights, by_blocks.weights) and at_once.notes == by_blocks.notes
    assert at_once.pairs == by_blocks.pairs
    assert seen == [(done, 9 * 40) for done in range(1, 9 * 40 + 1)]
    assert len(list((tmp_path / "v").rglob("*.npz"))) == 9


def test_all_images_of_many_queries_need_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    merged = module._merged
    monkeypatch.setattr(
        module, "_merged", lambda left, right, k: held.append(left[0].size + right[0].size) or merged(left, right, k)
    )
    monkeypatch.setattr(module, "_HELD", 2048)
    values = unit(np.random.default_rng(2).normal(size=(512, 8))).astype(np.float16)
    vectors = vector_sets.make(tmp_path / "e", values, shards=4)
    outcome = retrieve(vectors, vectors, RetrieveOptions(k=10**9), tmp_path / "w", progress=vector_sets.quiet)
    assert outcome.counts["kept"] == 512 and max(held) <= 2048 and held


def test_a_stopped_retrieval_continues_with_the_parts_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = unit(np.random.default_rng(3).normal(size=(96, 8))).astype(np.float16)
    vectors = vector_sets.make(tmp_path / "e", values, shards=32)
    expected = retrieve(vectors, vectors, RetrieveOptions(k=2), tmp_path / "w", progress=vector_sets.quiet)

    def stop(_: str, done: int, __: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrieve(vectors, vectors, RetrieveOptions(k=2), tmp_path / "v", progress=stop)
    compared: list[int] = []
    again = retrieve(vectors, vectors, RetrieveOptions(k=2), tmp_path / "v", progress=lambda _, done, __: compared.append(done))
    assert compared == list(range(19, 33)) and np.array_equal(again.weights, expected.weights)


def test_clusters_with_a_query_give_their_images(tmp_path: Path) -> None:
    values, labels = blobs([80, 60, 40, 20])
    vectors = vector_sets.make(tmp_path / "e", values)
    queries = vector_sets.make(tmp_path / "q", np.concatenate([values[labels == 1][:3], values[labels == 3][:1]]), shards=1)
    options = RetrieveOptions(k=15, mode="clusters", clusters=4)
    outcome = retrieve(vectors, queries, options, tmp_path / "w", progress=vector_sets.quiet)
    assert set(labels[outcome.weights > 0].tolist()) == {1, 3} and outcome.counts["kept"] == 30


def test_more_neighbors_than_images_are_all_images(tmp_path: Path) -> None:
    values, _ = blobs([6, 3])
    vectors, queries = vector_sets.make(tmp_path / "e", values, shards=5), vector_sets.make(tmp_path / "q", values[:2], shards=1)
    assert retrieve(vectors, queries, RetrieveOptions(k=50), tmp_path / "w", progress=vector_sets.quiet).counts["kept"] == 9
