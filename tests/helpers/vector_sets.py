"""Folders of embeddings made from arrays."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.curation.vectors import Vectors
from pipeline.data.embeddings.document import EmbeddingSpec, WeightsSpec
from pipeline.data.embeddings.reader import Embeddings, finish, write_shard

FINGERPRINT = "0123456789abcdef" * 2


def make(
    folder: Path,
    values: NDArray[Any],
    *,
    shards: int = 4,
    labels: NDArray[Any] | None = None,
    contents: NDArray[Any] | None = None,
    sides: NDArray[Any] | None = None,
    captions: NDArray[Any] | None = None,
    sizes: NDArray[Any] | None = None,
    fingerprint: str = FINGERPRINT,
    weights: str = "a" * 64,
    dtype: str = "float16",
) -> Vectors:
    """Writes vectors as the embeddings of some shards.

    Args:
        folder: the folder.
        values: ``[n, dim]``.
        shards: number of shards, of nearly equal size.
        labels: class of each sample.
        contents: a number for each image; those of equal images are equal.
        sides: width and height of each image.
        captions: bytes of each caption.
        sizes: bytes of each image.
        fingerprint: of the data set.
        weights: hash of the network.
        dtype: of the stored numbers.
    """
    n, dim = values.shape
    spec = EmbeddingSpec("cls", dim, dtype, weights=WeightsSpec("x", "x", weights))  # type: ignore[arg-type]
    contents = np.arange(n) if contents is None else contents
    done = []
    for number, rows in enumerate(np.array_split(np.arange(n), shards)):
        filled = np.full(len(rows), 32, dtype=np.int32)
        digests = [hashlib.blake2b(int(contents[row]).to_bytes(8, "little"), digest_size=16).digest() for row in rows]
        columns = {
            "key": [f"{row:06d}" for row in rows],
            "shard": np.full(len(rows), number, dtype=np.int32),
            "row": np.arange(len(rows), dtype=np.int32),
            "embedding": values[rows],
            "width": filled if sides is None else sides[rows].astype(np.int32),
            "height": filled if sides is None else sides[rows].astype(np.int32),
            "label": np.full(len(rows), -1) if labels is None else labels[rows],
            "caption_bytes": filled * 0 if captions is None else captions[rows].astype(np.int32),
            "image_bytes": filled if sizes is None else sizes[rows].astype(np.int32),
            "digest": np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16),
        }
        shard = f"{number:032x}"
        done.append(write_shard(folder, spec, number, columns, url=f"/data/{number}.tar", digest=shard, samples=len(rows)))
    return Vectors.of(finish(folder, spec, fingerprint, done))


def quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


def opened(folder: Path) -> Embeddings:
    """The folder, opened."""
    return Embeddings.open(folder)
