"""What a curation command selected, and how its selection file is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.curation.vectors import Vectors
from pipeline.data.selections.file import Part, Selection, SelectionInfo, write_selection
from pipeline.errors import DataError
from pipeline.untrusted import printable


@dataclass(frozen=True)
class Pair:
    """Two samples and how similar they are.

    Attributes:
        a: position of the first.
        b: position of the second; in the other set, if ``other`` is set.
        cosine: of their embeddings.
        kept: whether the first is selected.
        other: number of the other set, -1 for the same one.
    """

    a: int
    b: int
    cosine: float
    kept: bool
    other: int = -1


@dataclass
class Outcome:
    """Result of a curation command.

    Attributes:
        weights: of each sample, by position, 0 for one that is left out; float64 ``[n]``.
        counts: samples by the reason why they were kept or left out.
        pairs: examples of pairs, the most similar first.
        clusters: nearest cluster of each sample, if there are clusters.
        cosines: of each sample and its cluster, if there are clusters.
        notes: lines for a person.
    """

    weights: NDArray[np.float64]
    counts: dict[str, int]
    pairs: list[Pair] = field(default_factory=list)
    clusters: NDArray[np.int32] | None = None
    cosines: NDArray[np.float32] | None = None
    notes: list[str] = field(default_factory=list)


def write_outcome(path: Path, outcome: Outcome, vectors: Vectors, made: dict[str, Any]) -> SelectionInfo:
    """Writes the selection of an outcome.

    Args:
        path: the file.
        outcome: what was selected.
        vectors: the samples.
        made: command and settings.

    Raises:
        DataError: nothing is selected, or the file cannot be written.
    """
    document = vectors.embeddings.document
    return write_selection(
        path,
        _parts(outcome.weights, vectors),
        fingerprint=document.fingerprint,
        total=document.counts["samples"],
        made={**made, "weights": document.spec.weights.digest, "pooling": document.spec.pooling},
        counts={**outcome.counts, "not_embedded": document.counts["bad"]},
    )


def earlier_weights(files: Sequence[Path], vectors: Vectors) -> NDArray[np.float64]:
    """Returns the weights that some selections together give each sample, by position: 0 for one that is not selected.

    Args:
        files: selections of the embedded data set.
        vectors: the samples.

    Raises:
        DataError: a selection belongs to other data, or is damaged.
    """
    weights = np.ones(vectors.total)
    for file in files:
        selection = Selection(file)
        if selection.info.fingerprint != vectors.embeddings.fingerprint:
            raise DataError(
                "the selection belongs to other data than the embeddings",
                where=printable(str(file)),
                hint="Use a selection of the embedded shards",
            )
        own = np.zeros(vectors.total)
        for part in selection.parts():
            if part.shard >= len(vectors.ends):
                raise DataError(f"shard {part.shard} does not exist", where=printable(str(file)), hint="Make the selection again")
            size = vectors.embeddings.shards[part.shard].samples
            if int(part.rows[-1]) >= size:
                raise DataError(
                    f"row {int(part.rows[-1])} of shard {part.shard} does not exist: it has {size} samples",
                    where=printable(str(file)),
                    hint="Make the selection again",
                )
            rows = vectors.embeddings.read(part.shard, ("row",))["row"].astype(np.int64)
            _, ours, theirs = np.intersect1d(rows, part.rows, assume_unique=True, return_indices=True)
            own[vectors.first(part.shard) + ours] = part.weights[theirs]
        weights *= own
    return weights


def _parts(weights: NDArray[np.float64], vectors: Vectors) -> Iterator[Part]:
    for shard, end in enumerate(vectors.ends.tolist()):
        own = weights[vectors.first(shard) : end]
        rows = vectors.embeddings.read(shard, ("row",))["row"].astype(np.int64)
        yield Part(shard, rows[own > 0], own[own > 0])
