"""Near-duplicates: samples whose embeddings have a cosine above a threshold, compared within clusters.

SemDeDup (arXiv 2303.09540) compares so. Unlike there, a sample is compared in several of its nearest clusters, and groups of
duplicates are connected components over all clusters. Of each group one sample is kept: one with a caption rather than without,
then the one with most pixels, then the one with most bytes, then the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.data.curation.clusters import Grouped
from pipeline.data.curation.vectors import Vectors, best_products, in_order, products
from pipeline.data.curation.workspace import Workspace

SAMPLES_PER_CLUSTER = 4096
ROUNDING = 2e-6  # of the cosine of equal vectors, which may be less than 1 by as much
_BLOCK = 2048  # rows and columns of a block of cosines
_MOST_EDGES = 1 << 21  # edges that are kept before they are contracted
_PIECE = 1 << 15  # vectors of another set that are compared at a time
_HELD = 1 << 28  # bytes of the vectors of another set that are held at a time
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Links:
    """Near-duplicates within one cluster.

    Attributes:
        a, b: positions of two samples of the same group, int64 ``[n]``; enough of them to connect every group.
        rows: positions of the cluster's own samples, int64 ``[m]``.
        neighbors: position of the most similar other sample, -1 if there is none, int64 ``[m]``.
        cosines: their cosine, float32 ``[m]``.
    """

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    rows: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    cosines: NDArray[np.float32]


_TYPES = {"a": np.int64, "b": np.int64, "rows": np.int64, "neighbors": np.int64, "cosines": np.float32}


def links_of(grouped: Grouped, cluster: int, threshold: float, work: Workspace) -> Links:
    """Compares the samples of a cluster.

    Args:
        grouped: the clusters.
        cluster: its number.
        threshold: least cosine of near-duplicates.
        work: for intermediate results.
    """

    def make() -> dict[str, NDArray[Any]]:
        members = grouped.members(cluster)
        a, b, neighbors, cosines = compare(members.vectors, threshold, members.primary)
        nearest = np.where(neighbors >= 0, members.positions[neighbors], -1)
        positions = members.positions
        return {
            "a": positions[a],
            "b": positions[b],
            "rows": positions[members.primary],
            "neighbors": nearest[members.primary],
            "cosines": cosines[members.primary],
        }

    return Links(**work.arrays(f"links/{cluster:06d}", _TYPES, make))


def compare(
    vectors: NDArray[np.float32], threshold: float, rows: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Finds near-duplicates among unit vectors.

    Args:
        vectors: ``[n, dim]``.
        threshold: least cosine.
        rows: which of them are compared with all; by default all.

    Returns:
        Ends of edges that connect all groups, and of each vector the most similar other one (-1 if there is none) and its cosine.
    """
    n = len(vectors)
    chosen = np.arange(n) if rows is None else np.flatnonzero(rows)
    neighbors, cosines = np.full(n, -1, dtype=np.int64), np.full(n, -1, dtype=np.float32)
    labels = np.arange(n)
    kept_a: list[NDArray[np.int64]] = []
    kept_b: list[NDArray[np.int64]] = []
    new: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for column in range(0, n, _BLOCK):
        right = torch.from_numpy(np.ascontiguousarray(vectors[column : column + _BLOCK].T))
        for begin in range(0, len(chosen), _BLOCK):
            own = chosen[begin : begin + _BLOCK]
            cosine = products(vectors[own], right).numpy()
            itself = own - column
            inside = (itself >= 0) & (itself < cosine.shape[1])
            cosine[np.flatnonzero(inside), itself[inside]] = -2
            best = cosine.argmax(axis=1)
            values = cosine[np.arange(len(own)), best]
            better = values > cosines[own]
            neighbors[own[better]], cosines[own[better]] = best[better] + column, values[better]
            left, hit = np.nonzero(cosine >= threshold - ROUNDING)
            a, b = own[left], hit + column
            apart = labels[a] != labels[b]
            if apart.any():
                new.append((a[apart], b[apart]))
            if sum(len(a) for a, _ in new) > _MOST_EDGES:
                labels = _contract(labels, new, kept_a, kept_b)
    _contract(labels, new, kept_a, kept_b)
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *kept_a]), np.concatenate([empty, *kept_b]), neighbors, cosines


def _contract(
    labels: NDArray[np.int64],
    new: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    kept_a: list[NDArray[np.int64]],
    kept_b: list[NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Returns the groups with some new edges, and keeps one edge from each sample whose group changed to its group's first."""
    if not new:
        return labels
    a, b = (np.concatenate([edge[side] for edge in new]) for side in (0, 1))
    new.clear()
    groups = components(len(labels), labels[a], labels[b])[labels]
    changed = np.flatnonzero(groups != labels)
    kept_a.append(changed)
    kept_b.append(groups[changed])
    return groups


def components(n: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns for each of ``n`` nodes the smallest node of its connected component.

    Args:
        n: number of nodes.
        a: one end of each edge.
        b: the other end.
    """
    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(n, n))
    count, names = connected_components(graph, directed=False)
    smallest = np.full(count, n, dtype=np.int64)
    np.minimum.at(smallest, names, np.arange(n))
    return smallest[names]


def same_content(digests: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns edges between samples of equal content, from each to the first of them.

    Args:
        digests: hash of each sample's image, uint8 ``[n, 16]``.
    """
    values = np.ascontiguousarray(digests).view([("high", ">u8"), ("low", ">u8")]).reshape(-1)
    order = np.lexsort((np.arange(len(values)), values["low"], values["high"]))
    same = np.concatenate([[False], values[order][1:] == values[order][:-1]])
    first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
    return order[same], first[same]


def among(digests: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Returns which hashes are among others.

    Args:
        digests: uint8 ``[n, 16]``.
        others: uint8 ``[m, 16]``.
    """
    ours, theirs = (np.ascontiguousarray(one).view("S16").reshape(-1) for one in (digests, others))
    theirs = np.sort(theirs)
    at = np.minimum(np.searchsorted(theirs, ours), max(len(theirs) - 1, 0))
    return theirs[at] == ours if len(theirs) else np.zeros(len(ours), dtype=bool)


@dataclass(frozen=True)
class Quality:
    """What decides which sample of a group is kept.

    Attributes:
        captioned: whether it has a caption, bool ``[n]``.
        pixels: width times height, int64 ``[n]``.
        size: bytes of the encoded image, int64 ``[n]``.
    """

    captioned: NDArray[np.bool_]
    pixels: NDArray[np.int64]
    size: NDArray[np.int64]

    @classmethod
    def of(cls, vectors: Vectors) -> Quality:
        """Reads the columns of a folder of embeddings."""
        pixels = vectors.column("width").astype(np.int64) * vectors.column("height")
        return cls(vectors.column("caption_bytes") > 0, pixels, vectors.column("image_bytes").astype(np.int64))

    def take(self, positions: NDArray[np.int64]) -> Quality:
        """Returns that of some samples."""
        return Quality(self.captioned[positions], self.pixels[positions], self.size[positions])


def best_of_groups(groups: NDArray[np.int64], quality: Quality) -> NDArray[np.bool_]:
    """Returns which samples are the best of their groups.

    Args:
        groups: of each sample, see :func:`components`.
        quality: of each sample.
    """
    sizes = np.bincount(groups, minlength=len(groups))
    kept = sizes[groups] == 1
    several = np.flatnonzero(~kept)
    keys = (several, -quality.size[several], -quality.pixels[several], ~quality.captioned[several], groups[several])
    order = several[np.lexsort(keys)]
    kept[order[np.diff(groups[order], prepend=-1) != 0]] = True
    return kept


def nearest_of_others(
    vectors: Vectors, others: Vectors, work: Workspace, name: str, workers: int, progress: Progress
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns for each sample the most similar sample of another set, by position, and its cosine: ``[n]`` each.

    Args:
        vectors: the samples.
        others: the other set, of which a bounded part is held in memory; all samples are read once for each part.
        work: for intermediate results.
        name: of the other set among them.
        workers: threads.
        progress: called with (stage, done, total).
    """
    nearest, cosines = np.zeros(vectors.total, dtype=np.int64), np.full(vectors.total, -2, dtype=np.float32)
    rows = max(1, _HELD // (4 * others.dim * _PIECE)) * _PIECE
    shards, count = range(len(vectors.ends)), -(-others.total // rows)
    for number, (first, block) in enumerate(others.blocks(rows)):
        task = partial(_nearest_of_block, vectors, torch.from_numpy(block.T.copy()), work, f"{name}/{number:04d}")
        for shard, (own, values) in enumerate(in_order(task, shards, workers)):
            better = np.flatnonzero(values > cosines[vectors.first(shard) : vectors.ends[shard]])
            positions = vectors.first(shard) + better
            nearest[positions], cosines[positions] = own[better] + first, values[better]
            progress("comparing", number * len(shards) + shard + 1, count * len(shards))
    return nearest, cosines


def _nearest_of_block(
    vectors: Vectors, columns: torch.Tensor, work: Workspace, name: str, shard: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns for each sample of a shard the most similar column and its cosine."""

    def make() -> dict[str, NDArray[Any]]:
        own = vectors.read(shard)
        nearest, cosines = np.zeros(len(own), dtype=np.int64), np.full(len(own), -2, dtype=np.float32)
        for begin in range(0, columns.shape[1], _PIECE):
            values, indices = (one[:, 0].numpy() for one in best_products(own, columns[:, begin : begin + _PIECE]))
            better = values > cosines
            nearest[better], cosines[better] = indices[better] + begin, values[better]
        return {"nearest": nearest, "cosines": cosines}

    arrays = work.arrays(f"{name}-{shard:06d}", {"nearest": np.int64, "cosines": np.float32}, make)
    return arrays["nearest"], arrays["cosines"]


def all_links(
    grouped: Grouped, threshold: float, work: Workspace, clusters: Sequence[int], workers: int, progress: Progress
) -> Iterator[Links]:
    """Yields the near-duplicates within some clusters, in their order.

    Args:
        grouped: the clusters.
        threshold: least cosine of near-duplicates.
        work: for intermediate results.
        clusters: their numbers.
        workers: threads.
        progress: called with (stage, done, total).
    """
    tasks: Iterable[int] = clusters
    for done, links in enumerate(in_order(lambda one: links_of(grouped, one, threshold, work), tasks, workers), start=1):
        progress("comparing", done, len(clusters))
        yield links
