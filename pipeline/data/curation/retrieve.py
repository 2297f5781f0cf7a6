"""Retrieves the images that are nearest to those of a small curated set (DINOv2, arXiv 2304.07193, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.curation.clusters import Clustering, Progress
from pipeline.data.curation.dedup import check_comparable, identity
from pipeline.data.curation.outcome import Outcome, Pair
from pipeline.data.curation.vectors import Vectors, best_products, draws, in_order, products
from pipeline.data.curation.workspace import Workspace, cores

_EXAMPLES = 48
_QUERIES = 8192  # that are compared at a time


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
    weights = np.zeros(vectors.total)
    if options.mode == "clusters":
        chosen, clusters, notes = _from_clusters(vectors, queries, options, space, threads, progress)
        weights[chosen] = 1
        pairs: list[Pair] = []
    else:
        positions, cosines = _nearest(vectors, queries, options.k, space, threads, progress)
        near = cosines >= options.min_cosine
        weights[positions[near & (positions >= 0)]] = 1
        notes = [f"cosines of queries and their nearest images: {_quantiles(cosines[:, 0])}"]
        few = int((near.sum(axis=1) == 0).sum())
        if few:
            notes.append(f"{few} queries have no image with a cosine of at least {options.min_cosine:g}")
        clusters = None
        shown = np.argsort(draws(np.arange(len(positions), dtype=np.uint64), options.seed), kind="stable")[:_EXAMPLES]
        pairs = [Pair(int(positions[q, 0]), int(q), float(cosines[q, 0]), bool(near[q, 0]), 0) for q in shown]
    kept = int(weights.sum())
    return Outcome(weights, {"kept": kept, "left_out": vectors.total - kept}, pairs, clusters, notes=notes)


def _nearest(
    vectors: Vectors, queries: Vectors, k: int, work: Workspace, workers: int, progress: Progress
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns positions and cosines of each query's nearest images, nearest first, ``[queries, k]``; -1 where there are none."""
    curated = np.concatenate([queries.read(shard) for shard in range(len(queries.ends))])

    def task(shard: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        def make() -> dict[str, NDArray[Any]]:
            columns = torch.from_numpy(np.ascontiguousarray(vectors.read(shard).T))
            count = min(k, columns.shape[1])
            places = np.full((len(curated), k), -1, dtype=np.int64)
            values = np.full((len(curated), k), -2, dtype=np.float32)
            for begin in range(0, len(curated) if count else 0, _QUERIES):
                best = products(curated[begin : begin + _QUERIES], columns).topk(count, dim=1)
                rows = slice(begin, begin + len(best.values))
                places[rows, :count], values[rows, :count] = best.indices.numpy() + vectors.first(shard), best.values.numpy()
            return {"positions": places, "cosines": values}

        arrays = work.arrays(f"nearest/{shard:06d}", {"positions": np.int64, "cosines": np.float32}, make)
        return arrays["positions"].reshape(-1, k), arrays["cosines"].reshape(-1, k)

    positions = np.full((len(curated), k), -1, dtype=np.int64)
    cosines = np.full((len(curated), k), -2, dtype=np.float32)
    shards = range(len(vectors.ends))
    for done, (own, values) in enumerate(in_order(task, shards, workers), start=1):
        both, all_cosines = np.concatenate([positions, own], axis=1), np.concatenate([cosines, values], axis=1)
        order = np.argsort(-all_cosines, axis=1, kind="stable")[:, :k]
        positions, cosines = np.take_along_axis(both, order, axis=1), np.take_along_axis(all_cosines, order, axis=1)
        progress("comparing", done, len(shards))
    return positions, cosines


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
