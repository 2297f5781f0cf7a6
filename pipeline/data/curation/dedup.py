"""Removes near-duplicates within a set, and samples that are near those of other sets, such as evaluation sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.curation.clusters import Clustering, Grouped
from pipeline.data.curation.near_duplicates import (
    ROUNDING,
    SAMPLES_PER_CLUSTER,
    Progress,
    Quality,
    all_links,
    among,
    best_of_groups,
    components,
    nearest_of_others,
    same_content,
)
from pipeline.data.curation.outcome import Outcome, Pair
from pipeline.data.curation.vectors import Vectors, draws
from pipeline.data.curation.workspace import Workspace, cores
from pipeline.errors import DataError

_WINDOW = 0.05  # pairs within this distance of the threshold are examples
_EXAMPLES = 48
_LEVELS = (0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.999)


@dataclass(frozen=True)
class DedupOptions:
    """How near-duplicates are found.

    Attributes:
        threshold: least cosine of near-duplicates.
        against_threshold: least cosine of a sample that is near another set's.
        probes: nearest clusters in which a sample is compared.
        clusters: number of clusters; ``None``: one for 4096 samples.
        seed: of k-means.
        within: whether duplicates within the set are removed.
    """

    threshold: float = 0.95
    against_threshold: float = 0.95
    probes: int = 3
    clusters: int | None = None
    seed: int = 0
    within: bool = True

    def key(self, vectors: Vectors, against: Sequence[Vectors]) -> dict[str, Any]:
        """What intermediate results depend on, JSON values."""
        return {
            "data": [identity(one) for one in (vectors, *against)],
            "threshold": self.threshold,
            "probes": self.probes,
            "clusters": self.clusters,
            "seed": self.seed,
        }


def identity(vectors: Vectors) -> str:
    """Hash of all embeddings of a folder."""
    import hashlib

    digest = hashlib.sha256(vectors.embeddings.fingerprint.encode())
    for shard in vectors.embeddings.shards:
        digest.update(shard.sha256.encode())
    return digest.hexdigest()[:32]


def dedup(
    vectors: Vectors,
    options: DedupOptions,
    work: Path,
    *,
    against: Sequence[Vectors] = (),
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    progress: Progress,
) -> Outcome | None:
    """Decides which samples are kept.

    Args:
        vectors: the samples.
        options: thresholds and clusters.
        work: folder of intermediate results; the same command continues there.
        against: other sets; samples near theirs are removed.
        workers: threads; by default one per core.
        part: number, from 1, and count of parts: does only that part of the work.
        progress: called with (stage, done, total).

    Returns:
        ``None`` for a part.

    Raises:
        DataError: sets of other networks, or damaged ones.
    """
    for other in against:
        check_comparable(vectors, other)
    with Workspace(work, options.key(vectors, against), shared=part is not None) as space:
        return _dedup(vectors, options, space, against, workers or cores(), part, progress)


def _dedup(
    vectors: Vectors,
    options: DedupOptions,
    space: Workspace,
    against: Sequence[Vectors],
    threads: int,
    part: tuple[int, int] | None,
    progress: Progress,
) -> Outcome | None:
    grouped = _grouped(vectors, options, space, threads, part, progress) if options.within else None
    if part is not None:
        if grouped is not None:
            for _ in all_links(grouped, options.threshold, space, range(part[0] - 1, len(grouped), part[1]), threads, progress):
                pass
        return None
    n = vectors.total
    weights, notes = np.ones(n), []
    counts: dict[str, int] = {}
    pairs: list[Pair] = []
    digests = vectors.column("digest")
    for number, other in enumerate(against):
        near, equal, examples = _near(vectors, other, digests, options, space, number, threads, progress)
        counts["near_other_set"] = counts.get("near_other_set", 0) + int((weights[near] > 0).sum())
        notes.append(
            f"{int(near.sum())} samples are near one of {other.embeddings.directory}, {int(equal.sum())} of them with equal bytes"
        )
        weights[near] = 0
        pairs += examples
    if grouped is not None:
        notes += grouped.notes()
        pairs += _within(vectors, grouped, options, space, threads, digests, weights, counts, notes, progress)
    counts["kept"] = int((weights > 0).sum())
    pairs.sort(key=lambda pair: -pair.cosine)
    return Outcome(weights, counts, pairs, notes=notes)


def _grouped(
    vectors: Vectors, options: DedupOptions, work: Workspace, workers: int, part: tuple[int, int] | None, progress: Progress
) -> Grouped | None:
    clusters = options.clusters or max(1, vectors.total // SAMPLES_PER_CLUSTER)
    clustering = Clustering.learn(
        vectors, clusters, options.seed, work, probes=options.probes, workers=workers, progress=progress
    )
    shards = range(len(vectors.ends))
    clustering.assign(shards if part is None else shards[part[0] - 1 :: part[1]])
    if part is not None and not all(clustering.is_assigned(shard) for shard in shards):
        return None
    return Grouped(clustering)


def _within(
    vectors: Vectors,
    grouped: Grouped,
    options: DedupOptions,
    work: Workspace,
    workers: int,
    digests: NDArray[np.uint8],
    weights: NDArray[np.float64],
    counts: dict[str, int],
    notes: list[str],
    progress: Progress,
) -> list[Pair]:
    """Removes all but one sample of each group; returns examples of pairs around the threshold."""
    n = vectors.total
    ends_a, ends_b = same_content(digests)
    a, b = [ends_a], [ends_b]
    neighbors, cosines = np.full(n, -1, dtype=np.int64), np.full(n, -1, dtype=np.float32)
    for links in all_links(grouped, options.threshold, work, range(len(grouped)), workers, progress):
        a.append(links.a)
        b.append(links.b)
        neighbors[links.rows], cosines[links.rows] = links.neighbors, links.cosines
    left, right = np.concatenate(a), np.concatenate(b)
    groups = components(n, left, right)  # also over samples near another set: not every pair of a group has an edge
    usable = np.flatnonzero(weights > 0)
    kept = np.zeros(n, dtype=bool)
    kept[usable] = best_of_groups(groups[usable], Quality.of(vectors).take(usable))
    removed = ~kept & (weights > 0)
    sizes = np.bincount(groups[usable], minlength=n)
    best = np.zeros(n, dtype=np.int64)
    best[groups[kept]] = np.flatnonzero(kept)
    equal = removed & (digests[np.arange(n)] == digests[best[groups]]).all(axis=1)
    counts["exact_duplicate"], counts["near_duplicate"] = int(equal.sum()), int((removed & ~equal).sum())
    weights[removed] = 0
    several = sizes[sizes > 1]
    if len(several):
        notes.append(f"{len(several)} groups of duplicates, the largest of {several.max()} samples")
    labels = vectors.column("label")
    mixed = int(((labels != labels[best[groups]]) & (labels >= 0) & removed).sum())
    if mixed:
        notes.append(f"{mixed} removed samples have another class than the one that was kept: look at --preview")
    levels = ", ".join(f"{level:g}: {np.mean(cosines >= level):.1%}" for level in _LEVELS)
    notes.append(f"samples whose nearest neighbor has at least a cosine of {levels}")
    return _examples(neighbors, cosines, options.threshold, kept, options.seed)


def _examples(
    neighbors: NDArray[np.int64], cosines: NDArray[np.float32], threshold: float, kept: NDArray[np.bool_], seed: int
) -> list[Pair]:
    near = np.flatnonzero((np.abs(cosines - threshold) <= _WINDOW) & (neighbors >= 0))
    chosen = near[np.argsort(draws(near.astype(np.uint64), seed), kind="stable")[:_EXAMPLES]]
    return [Pair(int(a), int(neighbors[a]), float(cosines[a]), bool(kept[a])) for a in chosen]


def _near(
    vectors: Vectors,
    other: Vectors,
    digests: NDArray[np.uint8],
    options: DedupOptions,
    work: Workspace,
    number: int,
    workers: int,
    progress: Progress,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], list[Pair]]:
    nearest, cosines = nearest_of_others(vectors, other, work, f"against-{number}", workers, progress)
    equal = among(digests, other.column("digest"))
    near = (cosines >= options.against_threshold - ROUNDING) | equal
    examples = np.flatnonzero(near | (cosines >= options.against_threshold - _WINDOW))
    examples = examples[np.argsort(-cosines[examples], kind="stable")[:_EXAMPLES]]
    return near, equal, [Pair(int(a), int(nearest[a]), float(cosines[a]), not near[a], number) for a in examples]


def check_comparable(vectors: Vectors, other: Vectors) -> None:
    """Checks that two sets were embedded alike.

    Raises:
        DataError: with what differs.
    """
    ours, theirs = vectors.embeddings.spec, other.embeddings.spec
    differences = [name for name in ("dim", "pooling", "image") if getattr(ours, name) != getattr(theirs, name)] + (
        ["weights"] if ours.weights.digest != theirs.weights.digest else []
    )
    if differences:
        raise DataError(
            f"the embeddings differ from those of {vectors.embeddings.directory} in {', '.join(differences)}",
            where=str(other.embeddings.directory),
            hint="Use the same weights and settings for both: fovea embed",
        )
