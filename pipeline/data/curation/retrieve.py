"""Retrieves the images that are nearest to those of a small curated set (DINOv2, arXiv 2304.07193, section 3)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.curation.clusters import Clustering, Progress
from pipeline.data.curation.dedup import check_comparable, identity
from pipeline.data.curation.outcome import Outcome, Pair
from pipeline.data.curation.vectors import Vectors, best_products, draws, in_order
from pipeline.data.curation.workspace import Workspace, cores

_EXAMPLES = 48
_QUERIES = 1 << 18  # most that are compared at a time
_HELD = 1 << 23  # nearest images of the queries that are compared at a time
_KEPT = 16  # parts of the shards whose results are kept until all are compared


@dataclass(frozen=True)
class RetrieveOptions:
    """How images are retrieved.

    Attributes:
        k: nearest images of each query; with clusters, images from each cluster that has a query.
        mode: ``nearest`` compares every query with every image; ``clusters`` takes images from the queries' clusters.
        clusters: number of clusters of the mode ``clusters``; ``None``: the square root of the number of samples.
        min_cosine: least cosine of a query and its nearest images.
        seed: of k-means and of the choice.
    """

    k: int = 4
    mode: Literal["nearest", "clusters"] = "nearest"
    clusters: int | None = None
    min_cosine: float = -1.0
    seed: int = 0


def retrieve(
    vectors: Vectors, queries: Vectors, options: RetrieveOptions, work: Path, *, workers: int | None = None, progress: Progress
) -> Outcome:
    """Selects the images that are near a curated set.

    Args:
        vectors: the samples to choose from.
        queries: the curated set.
        options: how many, and how.
        work: folder of intermediate results; the same command continues there.
        workers: threads; by default one per core.
        progress: called with (stage, done, total).

    Raises:
        DataError: the sets were embedded differently.
    """
    check_comparable(vectors, queries)
    key = {"data": [identity(vectors), identity(queries)], "k": options.k, "clusters": options.clusters, "seed": options.seed}
    with Workspace(work, key) as space:
        return _retrieve(vectors, queries, options, space, workers or cores(), progress)


def _retrieve(
    vectors: Vectors, queries: Vectors, options: RetrieveOptions, space: Workspace, threads: int, progress: Progress
) -> Outcome:
    if options.mode == "clusters":
        chosen, clusters, notes = _from_clusters(vectors, queries, options, space, threads, progress)
        weights = np.zeros(vectors.total)
        weights[chosen] = 1
        kept = int(weights.sum())
        return Outcome(weights, {"kept": kept, "left_out": vectors.total - kept}, [], clusters, notes=notes)
    return _by_neighbors(vectors, queries, options, space, threads, progress)


def _by_neighbors(
    vectors: Vectors, queries: Vectors, options: RetrieveOptions, space: Workspace, threads: int, progress: Progress
) -> Outcome:
    """Chooses the nearest images of each query, of a block of queries after the other."""
    k = min(options.k, vectors.total)
    rows = max(1, min(_QUERIES, _HELD // k))
    shards, blocks = len(vectors.ends), -(-queries.total // rows)
    weights, best = np.zeros(vectors.total), np.empty(queries.total, dtype=np.int64)
    cosines = np.empty(queries.total, dtype=np.float32)
    for number, (first, block) in enumerate(queries.blocks(rows)):

        def steps(done: int, before: int = number * shards) -> None:
            progress("comparing", before + done, blocks * shards)

        positions, values = _nearest(vectors, block, f"nearest-{rows}/{number:06d}", k, space, threads, steps)
        weights[positions[values >= options.min_cosine]] = 1
        best[first : first + len(block)], cosines[first : first + len(block)] = positions[:, 0], values[:, 0]
    near = cosines >= options.min_cosine
    notes = [f"cosines of queries and their nearest images: {_quantiles(cosines)}"]
    if not near.all():
        notes.append(f"{int((~near).sum())} queries have no image with a cosine of at least {options.min_cosine:g}")
    shown = np.argsort(draws(np.arange(queries.total, dtype=np.uint64), options.seed), kind="stable")[:_EXAMPLES]
    pairs = [Pair(int(best[q]), int(q), float(cosines[q]), bool(near[q]), 0) for q in shown]
    kept = int(weights.sum())
    return Outcome(weights, {"kept": kept, "left_out": vectors.total - kept}, pairs, notes=notes)


def _nearest(
    vectors: Vectors,
    queries: NDArray[np.float32],
    name: str,
    k: int,
    work: Workspace,
    workers: int,
    progress: Callable[[int], None],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns positions and cosines of each query's nearest images, nearest first, ``[queries, k]``.

    The nearest of some shards each are kept until those of all are known, so that an interrupted command continues.

    Args:
        vectors: the samples, at least ``k``.
        queries: unit vectors ``[queries, dim]``.
        name: of the intermediate results.
        k: how many.
        work: for intermediate results.
        workers: threads.
        progress: called with the number of shards that were compared.
    """
    types = {"positions": np.int64, "cosines": np.float32}
    shards = len(vectors.ends)
    kept = np.unique(np.linspace(0, shards, _KEPT + 1).round().astype(int))  # after these shards

    def of_shard(shard: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        columns = torch.from_numpy(np.ascontiguousarray(vectors.read(shard).T))
        values, places = best_products(queries, columns, min(k, columns.shape[1]))
        return places.numpy() + vectors.first(shard), values.numpy()

    def of_shards(begin: int, end: int) -> dict[str, NDArray[Any]]:
        best: tuple[NDArray[np.int64], NDArray[np.float32]] = (
            np.empty((len(queries), 0), dtype=np.int64),
            np.empty((len(queries), 0), dtype=np.float32),
        )
        for done, own in enumerate(in_order(of_shard, range(begin, end), workers), start=begin + 1):
            best = _merged(best, own, k)
            progress(done)
        return {"positions": best[0], "cosines": best[1]}

    def of_all() -> dict[str, NDArray[Any]]:
        best: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
        for begin, end in itertools.pairwise(kept.tolist()):
            arrays = work.arrays(f"{name}-{end:06d}", types, partial(of_shards, begin, end))
            own = arrays["positions"].reshape(len(queries), -1), arrays["cosines"].reshape(len(queries), -1)
            best = own if best is None else _merged(best, own, k)
        assert best is not None
        return {"positions": best[0], "cosines": best[1]}

    arrays = work.arrays(name, types, of_all)
    for end in kept.tolist():
        work.remove(f"{name}-{end:06d}")
    return arrays["positions"].reshape(-1, k), arrays["cosines"].reshape(-1, k)


def _merged(
    left: tuple[NDArray[np.int64], NDArray[np.float32]], right: tuple[NDArray[np.int64], NDArray[np.float32]], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns the ``k`` nearest of both for each query, nearest first; of equals those on the left."""
    positions, cosines = np.concatenate([left[0], right[0]], axis=1), np.concatenate([left[1], right[1]], axis=1)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(positions, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def _from_clusters(
    vectors: Vectors, queries: Vectors, options: RetrieveOptions, work: Workspace, workers: int, progress: Progress
) -> tuple[NDArray[np.int64], NDArray[np.int32], list[str]]:
    clusters = options.clusters or max(1, round(vectors.total**0.5))
    clustering = Clustering.learn(vectors, clusters, options.seed, work, workers=workers, progress=progress)
    clustering.assign(range(len(vectors.ends)))
    columns = torch.from_numpy(np.ascontiguousarray(clustering.centroids.T))
    curated = in_order(lambda shard: best_products(queries.read(shard), columns)[1], range(len(queries.ends)), workers)
    hit = np.bincount(np.concatenate([one[:, 0].numpy() for one in curated]), minlength=clusters) > 0
    nearest = clustering.nearest()
    inside = np.flatnonzero(hit[nearest])
    order = inside[np.lexsort((draws(inside.astype(np.uint64), options.seed), nearest[inside]))]
    begins = np.flatnonzero(np.diff(nearest[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(np.append(begins, len(order))))
    return order[rank < options.k], nearest, [f"{int(hit.sum())} of {clusters} clusters have a query"]


def _quantiles(values: NDArray[np.float32]) -> str:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"median {middle:.3f}, 5 % below {low:.3f}, 5 % above {high:.3f}"
