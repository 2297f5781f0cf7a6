"""Clusters of all samples of a folder of embeddings: centroids, assignments, and the vectors in the order of clusters."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.curation.kmeans import POINTS_PER_CLUSTER, kmeans
from pipeline.data.curation.vectors import Vectors, best_products, in_order, unit
from pipeline.data.curation.workspace import Workspace, cannot_write
from pipeline.errors import DataError
from pipeline.untrusted import printable

_MOST_BYTES = 2 << 30  # of the vectors that centroids are learned from
_GROUPED = 1 << 29  # bytes of vectors that are sorted at a time
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Clustering:
    """Centroids, and where their assignments are kept.

    Attributes:
        vectors: the samples.
        centroids: unit vectors ``[clusters, dim]``.
        probes: number of nearest centroids that each sample is assigned to.
        work: intermediate results.
        workers: threads.
        progress: called with (stage, done, total).
    """

    vectors: Vectors
    centroids: NDArray[np.float32]
    probes: int
    work: Workspace
    workers: int
    progress: Progress

    @classmethod
    def learn(
        cls, vectors: Vectors, clusters: int, seed: int, work: Workspace, *, probes: int = 1, workers: int = 1, progress: Progress
    ) -> Clustering:
        """Learns centroids from a part of the samples, 256 for each.

        Args:
            vectors: the samples.
            clusters: number of centroids.
            seed: of the choice and of k-means.
            work: for intermediate results.
            probes: number of nearest centroids that each sample is assigned to.
            workers: threads.
            progress: called with (stage, done, total).

        Raises:
            DataError: there are fewer samples than clusters.
        """
        if clusters > vectors.total:
            raise DataError(
                f"{vectors.total} embeddings are fewer than {clusters} clusters", where="clusters", hint="Choose fewer clusters"
            )

        def make() -> dict[str, NDArray[np.float32]]:
            most = max(clusters, min(clusters * POINTS_PER_CLUSTER, _MOST_BYTES // (4 * vectors.dim)))
            points = vectors.sample(most, seed)
            if len(points) < clusters:  # chosen by chance
                points = vectors.sample(vectors.total, seed)
            steps = partial(progress, "k-means")
            return {"centroids": kmeans(points, clusters, seed, workers=workers, progress=steps)}

        with work.locked():
            flat = work.arrays(f"centroids-{clusters}", {"centroids": np.float32}, make)["centroids"]
        return cls(vectors, flat.reshape(-1, vectors.dim), min(probes, clusters), work, workers, progress)

    def assign(self, shards: Iterable[int]) -> None:
        """Assigns the samples of some shards."""
        tasks = list(shards)
        for done, _ in enumerate(in_order(self.assigned, tasks, self.workers), start=1):
            self.progress("assigning", done, len(tasks))

    def assigned(self, shard: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Returns the nearest centroids of a shard's samples, nearest first, and their cosines: ``[n, probes]`` each."""
        columns = torch.from_numpy(np.ascontiguousarray(self.centroids.T))

        def make() -> dict[str, NDArray[Any]]:
            values, indices = best_products(self.vectors.read(shard), columns, self.probes)
            return {"nearest": indices.numpy(), "similarity": values.numpy()}

        arrays = self.work.arrays(self._name(shard), {"nearest": np.int32, "similarity": np.float32}, make)
        return arrays["nearest"].reshape(-1, self.probes), arrays["similarity"].reshape(-1, self.probes)

    def is_assigned(self, shard: int) -> bool:
        """Whether a shard's samples have been assigned."""
        return self.work.has(self._name(shard))

    def _name(self, shard: int) -> str:
        return f"assigned-{len(self.centroids)}-{self.probes}/{shard:06d}"

    def nearest(self) -> NDArray[np.int32]:
        """Returns the nearest centroid of every sample, by position."""
        return np.concatenate([self.assigned(shard)[0][:, 0] for shard in range(len(self.vectors.ends))])

    def similarity(self) -> NDArray[np.float32]:
        """Returns the cosine of every sample and its nearest centroid, by position."""
        return np.concatenate([self.assigned(shard)[1][:, 0] for shard in range(len(self.vectors.ends))])

    def notes(self) -> list[str]:
        """Returns what a person should know of the vectors."""
        zeros = int((self.similarity() == 0).sum())
        return [f"{zeros} embeddings are zero, near no other: see which images they are of"] if zeros else []


@dataclass(frozen=True)
class Members:
    """Samples of a cluster.

    Attributes:
        positions: int64 ``[n]``.
        primary: whether the cluster is the sample's nearest, bool ``[n]``.
        vectors: unit vectors float32 ``[n, dim]``.
    """

    positions: NDArray[np.int64]
    primary: NDArray[np.bool_]
    vectors: NDArray[np.float32]


class Grouped:
    """The samples of a clustering in the order of its clusters, in files.

    Args:
        clustering: the samples and their clusters.
    """

    def __init__(self, clustering: Clustering) -> None:
        self._clustering = clustering
        self.notes = clustering.notes
        self._dim = clustering.vectors.dim
        self._folder = clustering.work.folder
        with clustering.work.locked():
            types = {"ends": np.int64, "positions": np.uint32, "vectors": np.uint32}
            made = clustering.work.arrays("grouped", types, self._write)
        self._ends, self._sums = made["ends"], (made["positions"], made["vectors"])

    def __len__(self) -> int:
        return len(self._ends)

    def members(self, cluster: int) -> Members:
        """Reads the samples of a cluster, the nearest and those that have it among their probes."""
        begin, end = int(self._ends[cluster - 1]) if cluster else 0, int(self._ends[cluster])
        marks = np.fromfile(self._folder / "grouped.positions", dtype=np.int64, count=end - begin, offset=begin * 8)
        values = np.fromfile(
            self._folder / "grouped.vectors", dtype=np.float16, count=(end - begin) * self._dim, offset=begin * self._dim * 2
        )
        if len(marks) < end - begin or len(values) < (end - begin) * self._dim:
            raise DataError(
                "an intermediate file is cut off", where=printable(str(self._folder)), hint="Remove this folder and start again"
            )
        if (zlib.crc32(marks.data), zlib.crc32(values.data)) != (self._sums[0][cluster], self._sums[1][cluster]):
            raise DataError(
                "an intermediate file is damaged", where=printable(str(self._folder)), hint="Remove this folder and start again"
            )
        return Members(marks >> 1, (marks & 1).astype(bool), unit(values.reshape(-1, self._dim)))

    def _write(self) -> dict[str, NDArray[Any]]:
        files = [self._folder / f"grouped.{name}" for name in ("positions", "vectors")]
        try:
            return self._written(*files)
        except OSError as error:
            for path in files:
                path.unlink(missing_ok=True)
            raise cannot_write(files[1], error) from error

    def _written(self, positions: Path, stored: Path) -> dict[str, NDArray[Any]]:
        """Writes both files; returns the end of each cluster, and the checksums of its parts of the files."""
        own, vectors = self._clustering, self._clustering.vectors
        shards = range(len(vectors.ends))
        counts = np.zeros(len(own.centroids), dtype=np.int64)
        for shard in shards:
            counts += np.bincount(own.assigned(shard)[0].reshape(-1), minlength=len(counts))
        ends = np.cumsum(counts)
        ahead = ends - counts  # where the next samples of each cluster go
        sums = np.zeros((2, len(counts)), dtype=np.uint32)
        pending: list[int] = []
        with positions.open("wb") as marks, stored.open("wb") as values:
            for shard in shards:
                pending.append(shard)
                held = int(vectors.ends[shard]) - vectors.first(pending[0])
                if held * self._dim * 4 >= _GROUPED or shard == shards[-1]:
                    self._append(pending, ahead, sums, marks.fileno(), values.fileno())
                    own.progress("grouping", shard + 1, len(shards))
                    pending = []
            for file in (marks, values):
                os.fsync(file.fileno())
        return {"ends": ends, "positions": sums[0], "vectors": sums[1]}

    def _append(self, shards: list[int], ahead: NDArray[np.int64], sums: NDArray[np.uint32], marks: int, values: int) -> None:
        """Writes the samples of some shards to their clusters' places, and moves these on."""
        own, vectors = self._clustering, self._clustering.vectors
        stored = np.concatenate([vectors.read(shard).astype(np.float16) for shard in shards])
        clusters = np.concatenate([own.assigned(shard)[0] for shard in shards])
        first = vectors.first(shards[0])
        order = np.argsort(clusters.reshape(-1), kind="stable")
        rows, probes = np.divmod(order, clusters.shape[1])
        marked = ((rows + first) << 1) | (probes == 0)
        sorted_clusters = clusters.reshape(-1)[order]
        begins = np.flatnonzero(np.diff(sorted_clusters, prepend=-1))
        for begin, end in zip(begins, np.append(begins[1:], len(order)), strict=True):
            cluster = sorted_clusters[begin]
            at = int(ahead[cluster])
            for number, (file, content, size) in enumerate(
                ((marks, marked[begin:end], 8), (values, stored[rows[begin:end]], self._dim * 2))
            ):
                data = content.tobytes()
                _write_at(file, data, at * size)
                sums[number, cluster] = zlib.crc32(data, int(sums[number, cluster]))
            ahead[cluster] += end - begin


def _write_at(file: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
