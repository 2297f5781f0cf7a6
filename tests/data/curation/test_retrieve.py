"""Retrieval: exactly the nearest images of each query, or images of the queries' clusters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.curation.retrieve import RetrieveOptions, retrieve
from pipeline.data.curation.vectors import unit
from tests.data.curation.test_balance import blobs
from tests.helpers import vector_sets


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
