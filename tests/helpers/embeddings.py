"""Folders of embeddings for tests of what reads them, and the bytes of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.embeddings.document import EmbeddingSpec
from pipeline.data.embeddings.reader import Embeddings, finish, write_shard
from pipeline.data.embeddings.work import digest_of

FINGERPRINT = "0123456789abcdef" * 2


def columns(spec: EmbeddingSpec, shard: int, samples: int, *, seed: int = 0, skipped: tuple[int, ...] = ()) -> dict[str, Any]:
    """Random embeddings of a shard's samples, without those that are skipped."""
    rng = np.random.default_rng([seed, shard])
    rows = np.array([row for row in range(samples) if row not in skipped], dtype=np.int32)
    each = spec.rows_per_sample
    keys = [f"{shard}/sample é {row:05d}" for row in rows]
    return {
        "key": [key for key in keys for _ in range(each)],
        "shard": np.full(len(rows) * each, shard, dtype=np.int32),
        "row": np.repeat(rows, each),
        "patch": np.tile(np.arange(each, dtype=np.int32), len(rows)),
        "embedding": rng.normal(size=(len(rows) * each, spec.dim)).astype(np.float32),
        "width": np.full(len(rows) * each, 40, dtype=np.int32),
        "height": np.full(len(rows) * each, 30, dtype=np.int32),
        "label": np.repeat(rows % 5 - 1, each).astype(np.int64),
        "caption_bytes": np.repeat(rows % 3, each).astype(np.int32),
        "image_bytes": np.repeat(rows % 7, each).astype(np.int32),
        "digest": np.frombuffer(b"".join(digest_of(key.encode()) for key in keys for _ in range(each)), np.uint8).reshape(-1, 16),
    }


def write(folder: Path, spec: EmbeddingSpec, sizes: tuple[int, ...] = (20, 0, 7), **options: Any) -> Embeddings:
    """A complete folder of random embeddings."""
    shards = [
        write_shard(
            folder,
            spec,
            number,
            columns(spec, number, size, **options),
            url=f"s3://user:secret@bucket/set/train-{number}.tar?signature=secret",
            digest=f"{number:032x}",
            samples=size,
            bad=sum(row < size for row in options.get("skipped", ())),
        )
        for number, size in enumerate(sizes)
    ]
    return finish(folder, spec, FINGERPRINT, shards)


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of a folder but the records of a Slurm job."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "job"
    }
