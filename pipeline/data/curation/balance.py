"""Balanced sampling from hierarchical clusters: each concept gets an equal share, from coarse to fine (arXiv 2405.15613)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.curation.clusters import Clustering, Progress
from pipeline.data.curation.dedup import identity
from pipeline.data.curation.kmeans import MOST_LINKED, hierarchy, linked_hierarchy
from pipeline.data.curation.outcome import Outcome
from pipeline.data.curation.vectors import Vectors, draws
from pipeline.data.curation.workspace import Workspace, cores
from pipeline.errors import DataError

Mode = Literal["subset", "weights"]
Coarse = Literal["auto", "linkage", "kmeans"]


@dataclass(frozen=True)
class BalanceOptions:
    """How samples are balanced.

    Attributes:
        levels: number of clusters of each level, the finest first.
        target: samples of an epoch.
        mode: ``subset`` leaves samples out, the same in every epoch; ``weights`` keeps all of them and lets each occur in its
            share of the epochs.
        max_weight: how often a sample of a small cluster may occur in an epoch, from 1.
        seed: of k-means and of the choice.
        coarse: how clusters are clustered: ``linkage`` joins the nearest ones, ``kmeans`` is the paper's way; ``auto`` is linkage
            up to 8192 clusters, k-means beyond.
    """

    levels: tuple[int, ...]
    target: int
    mode: Mode = "subset"
    max_weight: float = 1.0
    seed: int = 0
    coarse: Coarse = "auto"


def balance(
    vectors: Vectors,
    options: BalanceOptions,
    work: Path,
    *,
    among: NDArray[np.float64] | None = None,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    progress: Progress,
) -> Outcome | None:
    """Decides how often each sample occurs.

    Args:
        vectors: the samples.
        options: levels and target.
        work: folder of intermediate results.
        among: weights of an earlier selection, by position: those of weight 0 are left out; by default all samples.
        workers: threads; by default one per core.
        part: number, from 1, and count of parts: assigns only that part of the samples.
        progress: called with (stage, done, total).

    Returns:
        ``None`` for a part.

    Raises:
        DataError: levels that are not descending, or a target that cannot be reached.
    """
    if not options.levels or any(a <= b for a, b in zip(options.levels, options.levels[1:], strict=False)):
        raise DataError(
            f"levels {list(options.levels)} must descend", where="--levels", hint="Give the finest first, such as 1000,100,10"
        )
    if options.coarse == "linkage" and options.levels[0] > MOST_LINKED:
        raise DataError(
            f"{options.levels[0]} clusters are more than {MOST_LINKED}, which is what linkage can join",
            where="--coarse",
            hint="Use kmeans, or fewer clusters on the finest level",
        )
    key = {"data": identity(vectors), "levels": options.levels[0], "seed": options.seed}
    with Workspace(work, key, shared=part is not None) as space:
        return _balance(vectors, options, space, among, workers or cores(), part, progress)


def _balance(
    vectors: Vectors,
    options: BalanceOptions,
    space: Workspace,
    among: NDArray[np.float64] | None,
    threads: int,
    part: tuple[int, int] | None,
    progress: Progress,
) -> Outcome | None:
    clustering = Clustering.learn(vectors, options.levels[0], options.seed, space, workers=threads, progress=progress)
    shards = range(len(vectors.ends))
    clustering.assign(shards if part is None else shards[part[0] - 1 :: part[1]])
    if part is not None:
        return None
    nearest = clustering.nearest()
    usable = np.ones(vectors.total, dtype=bool) if among is None else among > 0
    sizes = np.bincount(nearest[usable], minlength=len(clustering.centroids))
    if options.coarse == "linkage" or (options.coarse == "auto" and options.levels[0] <= MOST_LINKED):
        parents = linked_hierarchy(clustering.centroids, options.levels[1:])
    else:
        parents = hierarchy(clustering.centroids, options.levels[1:], options.seed, workers=threads)
    rounding = options.seed if options.mode == "subset" else None
    quotas = quotas_of(sizes, parents, options.target, options.max_weight, rounding_seed=rounding)
    weights = np.zeros(vectors.total)
    if options.mode == "weights":
        weights[usable] = (quotas / np.maximum(sizes, 1))[nearest[usable]]
        weights[(weights > 0) & (weights < 1 / 65536)] = 1 / 65536
    else:
        _choose(weights, nearest, usable, quotas, options)
    kept = int((weights > 0).sum())
    counts = {"kept": kept, "left_out": int(usable.sum()) - kept}
    if among is not None:
        counts["not_selected_before"] = int((~usable).sum())
    used = sizes[sizes > 0]
    effective = np.bincount(nearest, weights=weights, minlength=len(sizes))[sizes > 0]
    notes = [
        f"{len(used)} clusters have {used.min()} to {used.max()} samples (median {int(np.median(used))}), in an epoch now "
        f"{effective.min():.1f} to {effective.max():.1f} (median {np.median(effective):.1f})",
        *_skew(vectors, usable, weights),
        *clustering.notes(),
    ]
    return Outcome(weights, counts, clusters=nearest, cosines=clustering.similarity(), notes=notes)


def quotas_of(
    sizes: NDArray[np.int64],
    parents: Sequence[NDArray[np.int64]],
    target: int,
    max_weight: float = 1.0,
    *,
    rounding_seed: int | None = None,
) -> NDArray[np.float64]:
    """Returns how many samples of an epoch come from each cluster of the finest level; they sum up to the target.

    At each level a cluster's share is divided equally among those below it, as far as their samples suffice: what one cannot fill
    goes to the others.

    Args:
        sizes: samples of each cluster of the finest level, ``[clusters]``.
        parents: the cluster of each cluster below it, from fine to coarse.
        target: samples of an epoch.
        max_weight: how often a sample may occur in an epoch.
        rounding_seed: round to samples at each level, which keeps the share of a cluster that has more clusters below it than
            samples; this seed decides which of those get one.

    Raises:
        DataError: the target is more than all samples at ``max_weight``.
    """
    room: list[NDArray[np.float64]] = [np.asarray(sizes * max_weight, dtype=np.float64)]
    for parent in parents:
        above = np.bincount(parent, weights=room[-1], minlength=int(parent.max(initial=-1)) + 1)
        room.append(above.astype(np.float64))
    available = float(sizes.sum() * max_weight)
    if target > available:
        often = f"at most {max_weight:g} times each" if max_weight > 1 else "that there are"
        raise DataError(
            f"a target of {target} is more than the {int(sizes.sum())} samples {often}",
            where="--target",
            hint="Lower it, or allow more repeats with --max-weight",
        )
    quotas = equal_shares(room[-1], float(target))
    if rounding_seed is not None:
        quotas = _rounded(quotas, room[-1], rounding_seed + len(parents))
    for level in range(len(parents) - 1, -1, -1):
        below = np.zeros(len(room[level]))
        order = np.argsort(parents[level], kind="stable")
        for children in np.split(order, np.flatnonzero(np.diff(parents[level][order])) + 1):
            shares = equal_shares(room[level][children], float(quotas[parents[level][children[0]]]))
            below[children] = shares if rounding_seed is None else _rounded(shares, room[level][children], rounding_seed + level)
        quotas = below
    return quotas


def equal_shares(room: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """Divides a total equally, never more than there is room for: ``min(room, level)`` with the level that sums up.

    Args:
        room: upper bounds, ``[n]``.
        total: at most their sum.
    """
    order = np.argsort(room, kind="stable")
    filled = np.concatenate([[0.0], np.cumsum(room[order])])
    left = len(room) - np.arange(len(room))
    levels = (total - filled[:-1]) / left  # the level, if all smaller ones are full
    fits = np.flatnonzero(levels <= room[order] * (1 + 1e-12) + 1e-9)
    level = levels[fits[0]] if len(fits) else np.inf
    return np.minimum(room, max(level, 0.0))


def _choose(
    weights: NDArray[np.float64],
    nearest: NDArray[np.int32],
    usable: NDArray[np.bool_],
    quotas: NDArray[np.float64],
    options: BalanceOptions,
) -> None:
    """Chooses each cluster's quota by a hash of the samples; small clusters' samples are repeated."""
    sizes = np.bincount(nearest[usable], minlength=len(quotas))
    counts = np.minimum(quotas, sizes)
    positions = np.flatnonzero(usable)
    order = positions[np.lexsort((draws(positions.astype(np.uint64), options.seed), nearest[positions]))]
    begins = np.cumsum(sizes) - sizes
    rank = np.arange(len(order)) - begins[nearest[order]]
    chosen = order[rank < counts[nearest[order]]]
    weights[chosen] = np.maximum(1.0, quotas / np.maximum(sizes, 1))[nearest[chosen]]


def _rounded(quotas: NDArray[np.float64], room: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Rounds quotas and keeps their sum where there is room: the largest remainders up, of equal ones those that are drawn."""
    floors = np.floor(quotas + 1e-9)
    missing = round(float(quotas.sum() - floors.sum()))
    order = np.lexsort((draws(np.arange(len(quotas), dtype=np.uint64), seed), -np.round(quotas - floors, 9)))
    up = order[floors[order] + 1 <= room[order] + 1e-9][: max(0, missing)]
    floors[up] += 1
    return floors


def _skew(vectors: Vectors, usable: NDArray[np.bool_], weights: NDArray[np.float64]) -> list[str]:
    labels = vectors.column("label")
    known = usable & (labels >= 0)
    if not known.any():
        return []
    names, classes = np.unique(labels[known], return_inverse=True)
    before, after = np.bincount(classes), np.bincount(classes, weights=weights[known])
    lost = f"; {int((after == 0).sum())} classes have no sample" if (after == 0).any() else ""
    ratio = after.max() / after[after > 0].min() if (after > 0).any() else np.inf
    return [
        f"largest to smallest of {len(names)} classes: {before.max() / before.min():.1f} before, {ratio:.1f} in an epoch{lost}"
    ]
