"""Spherical k-means, and its hierarchy: clusters of clusters (Vo et al., arXiv 2405.15613, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.curation.vectors import ROWS, best_products, draws, in_order, one_thread_each, unit
from pipeline.errors import DataError

POINTS_PER_CLUSTER = 256  # vectors that a centroid is learned from
ITERATIONS = 20
_SPREAD = 32  # points for each cluster among which those to begin with are chosen
_TRIALS = 5
_FEW = 1 << 24  # products of points and centroids up to which k-means is tried several times
_RESAMPLED = 4  # nearest points of each cluster that the next round of a level learns from
MOST_LINKED = 8192  # centroids whose distances to each other are held
Progress = Callable[[int, int], None]


def kmeans(
    points: NDArray[np.float32],
    clusters: int,
    seed: int,
    *,
    workers: int = 1,
    iterations: int = ITERATIONS,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Returns centroids of length 1 that maximize the cosine of each point with its own.

    Few points are clustered several times, and the best result is returned. A cluster that loses all its points gets the point
    that fits its own cluster least. Equal bytes for any number of threads.

    Args:
        points: unit vectors ``[n, dim]``.
        clusters: number of centroids, at most ``n``.
        seed: chooses the points that the centroids begin as.
        workers: threads.
        iterations: at most; fewer if no assignment changes.
        progress: called with (iterations done, their number).

    Returns:
        ``[clusters, dim]``.

    Raises:
        DataError: there are fewer points than clusters.
    """
    if len(points) < clusters:
        raise DataError(
            f"{len(points)} embeddings are fewer than {clusters} clusters", where="k-means", hint="Choose fewer clusters"
        )
    trials = _TRIALS if len(points) * clusters <= _FEW else 1
    best, best_fit = points[:0], -math.inf
    for trial in range(trials):
        steps = None if progress is None else _of_trial(progress, trial, trials)
        centroids, fit = _learned(points, _spread(points, clusters, seed + (trial << 32)), workers, iterations, steps)
        if fit > best_fit:
            best, best_fit = centroids, fit
    return best


def _of_trial(progress: Progress, trial: int, trials: int) -> Progress:
    return lambda done, total: progress(trial * total + done, trials * total)


def _learned(
    points: NDArray[np.float32], centroids: NDArray[np.float32], workers: int, iterations: int, progress: Progress | None
) -> tuple[NDArray[np.float32], float]:
    """Moves centroids to the means of their points until nothing changes; returns them and the sum of cosines."""
    nearest, fit = np.full(len(points), -1), -math.inf
    for iteration in range(iterations):
        before = nearest
        nearest, similarity, sums = _step(points, centroids, workers)
        fit = float(similarity.sum(dtype=np.float64))
        empty = np.flatnonzero(np.bincount(nearest, minlength=len(centroids)) == 0)
        centroids = unit(sums)
        centroids[empty] = points[np.argsort(similarity, kind="stable")[: len(empty)]]
        if progress is not None:
            progress(iteration + 1, iterations)
        if not len(empty) and np.array_equal(before, nearest):
            break
    return centroids, fit


def _spread(points: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.float32]:
    """Chooses points far from each other to begin with: k-means++ (Arthur and Vassilvitskii, SODA 2007) on some of the points."""
    order = np.argsort(draws(np.arange(len(points), dtype=np.uint64), seed), kind="stable")
    some = points[np.sort(order[: clusters * _SPREAD])]
    dice = draws(np.arange(clusters, dtype=np.uint64), seed + 1)
    with one_thread_each():
        values = torch.from_numpy(some)
        chosen = [int(dice[0] * len(some))]
        distance = 2 - 2 * (values @ values[chosen[0]])
        for number in range(1, clusters):
            sums = distance.clamp(min=0).double().cumsum(0)
            target = float(dice[number]) * float(sums[-1])
            pick = int(torch.searchsorted(sums, target, right=True)) if float(sums[-1]) > 0 else number
            chosen.append(min(pick, len(some) - 1))
            distance = torch.minimum(distance, 2 - 2 * (values @ values[chosen[-1]]))
    return some[chosen].copy()


def hierarchy(
    centroids: NDArray[np.float32], levels: Sequence[int], seed: int, *, rounds: int = 2, workers: int = 1
) -> list[NDArray[np.int64]]:
    """Clusters centroids, and the results again; each level learns a second time from the points nearest to its centroids.

    The second time evens out dense regions, which plain k-means gives too many centroids.

    Args:
        centroids: of the finest level, ``[clusters, dim]``.
        levels: number of clusters of each coarser level, descending.
        seed: of all levels.
        rounds: how often each level is learned.
        workers: threads.

    Returns:
        For each coarser level the cluster of each cluster below it.

    Raises:
        DataError: a level has more clusters than the one below.
    """
    parents, points = [], centroids
    for depth, clusters in enumerate(levels, start=1):
        coarse = kmeans(points, clusters, seed + depth, workers=workers)
        nearest, similarity = nearest_centroids(points, coarse, workers=workers)
        for _ in range(rounds - 1):
            chosen = _nearest_points(nearest, similarity, _RESAMPLED)
            if len(chosen) >= clusters:
                coarse = kmeans(points[chosen], clusters, seed + depth, workers=workers)
                nearest, similarity = nearest_centroids(points, coarse, workers=workers)
        parents.append(nearest)
        points = coarse
    return parents


def linked_hierarchy(centroids: NDArray[np.float32], levels: Sequence[int]) -> list[NDArray[np.int64]]:
    """Joins the two clusters whose members are nearest on average, again and again: each level is one state of that.

    Average linkage (Sokal and Michener 1958). Unlike k-means it gives a small group of clusters that lies apart a cluster of its
    own. Memory and time grow with the square of the number of centroids.

    Args:
        centroids: of the finest level, unit vectors ``[clusters, dim]``, :data:`MOST_LINKED` at most.
        levels: number of clusters of each coarser level, descending.

    Returns:
        For each coarser level the cluster of each cluster below it.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(centroids) < 2 or not levels:
        return [np.zeros(len(centroids), dtype=np.int64) for _ in levels]
    tree = linkage(np.asarray(centroids, dtype=np.float64), "average")
    parents, below = [], np.arange(len(centroids))
    for clusters in levels:
        coarse = np.unique(fcluster(tree, clusters, "maxclust"), return_inverse=True)[1]
        parent = np.zeros(int(below.max()) + 1, dtype=np.int64)
        parent[below] = coarse
        parents.append(parent)
        below = coarse
    return parents


def nearest_centroids(
    points: NDArray[np.float32], centroids: NDArray[np.float32], *, workers: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns the nearest centroid of each point, and their cosine: ``[n]`` each."""
    nearest, similarity, _ = _step(points, centroids, workers, sums=False)
    return nearest, similarity


def default_levels(total: int) -> tuple[int, ...]:
    """Returns default numbers of clusters: four times the square root of the number of samples, and the square root of that.

    Args:
        total: number of samples.
    """
    finest = max(1, min(total // 4, 4 * math.isqrt(total)))
    coarse = math.isqrt(finest)
    return (finest, coarse) if 1 < coarse < finest else (finest,)


def _nearest_points(nearest: NDArray[np.int64], similarity: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Returns the ``count`` points of each cluster that are nearest to its centroid, ascending."""
    order = np.lexsort((-similarity, nearest))
    begins = np.flatnonzero(np.diff(nearest[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(np.append(begins, len(order))))
    return np.sort(order[rank < count])


def _step(
    points: NDArray[np.float32], centroids: NDArray[np.float32], workers: int, *, sums: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]:
    """Assigns all points; returns the nearest centroids, the cosines, and the sums of each cluster's points."""
    columns = torch.from_numpy(np.ascontiguousarray(centroids.T))

    def part(begin: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        own = points[begin : begin + ROWS]
        values, indices = (one[:, 0] for one in best_products(own, columns))
        total = None
        if sums:
            total = torch.zeros(len(centroids), points.shape[1]).index_add_(0, indices, torch.from_numpy(own))
        return indices, values, total

    nearest, similarity = np.empty(len(points), dtype=np.int64), np.empty(len(points), dtype=np.float32)
    total = np.zeros(centroids.shape, dtype=np.float64)
    for number, (indices, values, own) in enumerate(in_order(part, range(0, len(points), ROWS), workers)):
        rows = slice(number * ROWS, number * ROWS + len(indices))
        nearest[rows], similarity[rows] = indices.numpy(), values.numpy()
        if own is not None:
            total += own.numpy()
    return nearest, similarity, total
