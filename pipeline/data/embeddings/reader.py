"""Reads a folder of embeddings, validated as foreign input; writes small ones.

``Embeddings.open(DIR)`` needs pyarrow and numpy, and nothing of the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.embeddings import document, table
from pipeline.data.embeddings.document import EmbeddedShard, EmbeddingDocument, EmbeddingSpec, file_name
from pipeline.data.storage.parquet import open_pyarrow
from pipeline.errors import DataError
from pipeline.untrusted import printable, shown_address

_RESTORE = "Restore the file, or embed the shards again into another folder"


class Embeddings:
    """A complete folder of embeddings.

    Args:
        directory: the folder.
        content: its description.
        verify: compare each file's SHA-256 with the description before its first use.

    Attributes:
        directory: the folder.
        document: its description.
    """

    def __init__(self, directory: Path, content: EmbeddingDocument, *, verify: bool = True) -> None:
        self.directory, self.document = directory, content
        self._unverified = set(range(len(content.shards))) if verify else set()

    @classmethod
    def open(cls, directory: str | Path, *, verify: bool = True) -> Embeddings:
        """Opens a folder that ``fovea embed`` has written.

        Args:
            directory: the folder.
            verify: compare each file's SHA-256 with the description before its first use.

        Raises:
            DataError: it is incomplete or damaged, or pyarrow is not installed.
        """
        open_pyarrow(str(directory))
        return cls(Path(directory), document.load(Path(directory)), verify=verify)

    def check_sizes(self) -> None:
        """Compares the sizes of all files with the description, which bounds the number of rows by what is on the disk.

        Raises:
            DataError: a file is missing, or has another size.
        """
        for about in self.shards:
            path = self.directory / about.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"cannot be read ({error.strerror})", where=printable(str(path)), hint=_RESTORE) from error
            if size != about.bytes:
                raise DataError(
                    f"has {size} bytes, and {about.bytes} in the description", where=printable(str(path)), hint=_RESTORE
                )

    @property
    def spec(self) -> EmbeddingSpec:
        """What was embedded."""
        return self.document.spec

    @property
    def shards(self) -> tuple[EmbeddedShard, ...]:
        """The shards, in the order that numbers the samples."""
        return self.document.shards

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data set."""
        return self.document.fingerprint

    @property
    def dim(self) -> int:
        """Numbers in an embedding."""
        return self.spec.dim

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of each shard's file, ``[shards]``."""
        return np.array([shard.rows for shard in self.shards], dtype=np.int64)

    def read(self, shard: int, columns: Sequence[str] = ("embedding",)) -> dict[str, NDArray[Any]]:
        """All rows of one shard: ``embedding [n, dim]`` in the stored type, ``digest [n, 16]`` uint8, ``key`` as texts,
        integers ``[n]``.

        Args:
            shard: its number.
            columns: names of columns.

        Raises:
            DataError: the file is missing or damaged, does not fit the description, or holds numbers that are not finite.
        """
        pieces = list(self.batches(shard, columns))
        if len(pieces) == 1:
            return pieces[0]
        if not pieces:
            return {name: _empty(name, self.spec) for name in columns}
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in columns}

    def batches(
        self, shard: int, columns: Sequence[str] = ("embedding",), *, rows: int = 1 << 16
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """The rows of one shard in pieces of at most ``rows`` rows, see :meth:`read`.

        Raises:
            DataError: as :meth:`read`.
        """
        if not 0 <= shard < len(self.shards):
            raise DataError(f"there is no shard {shard}", where=str(self.directory), hint=f"Use 0 to {len(self.shards) - 1}")
        if unknown := [name for name in columns if name not in table.column_names(self.spec)]:
            known = ", ".join(table.column_names(self.spec))
            raise DataError(f"there is no column {unknown[0]!r}", where=str(self.directory), hint=f"Choose one of {known}")
        about = self.shards[shard]
        path = self.directory / about.file
        if shard in self._unverified:
            self._verify(path, about)
            self._unverified.discard(shard)
        yield from table.read(path, self.spec, about, shard, columns, rows=rows)

    def _verify(self, path: Path, about: EmbeddedShard) -> None:
        try:
            size = path.stat().st_size
            same = size == about.bytes and table.sha256(path) == about.sha256
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=printable(str(path)), hint=_RESTORE) from error
        if not same:
            raise DataError(
                "was changed since it was written: its SHA-256 differs",
                where=printable(str(path)),
                hint=_RESTORE,
            )


def write_shard(
    directory: Path,
    spec: EmbeddingSpec,
    number: int,
    columns: table.Columns,
    *,
    url: str,
    digest: str,
    samples: int,
    bad: int = 0,
) -> EmbeddedShard:
    """Writes the embeddings of one shard.

    Args:
        directory: the folder.
        spec: what is embedded.
        number: of the shard.
        columns: see :func:`pipeline.data.embeddings.table.arrow_table`.
        url: of the shard.
        digest: hash of the shard's samples.
        samples: accepted samples of the shard.
        bad: samples without a row.
    """
    name = url.rsplit("/", 1)[-1].partition("?")[0]
    path = directory / file_name(number, name)
    directory.mkdir(parents=True, exist_ok=True)
    rows = table.write(path, spec, [columns])
    return EmbeddedShard(
        shown_address(url), printable(name), digest, samples, path.name, rows, path.stat().st_size, table.sha256(path), bad
    )


def finish(directory: Path, spec: EmbeddingSpec, fingerprint: str, shards: Sequence[EmbeddedShard]) -> Embeddings:
    """Completes a folder: writes its description.

    Args:
        directory: the folder.
        spec: what was embedded.
        fingerprint: of the data set.
        shards: all of them, in order.
    """
    EmbeddingDocument(spec, fingerprint, tuple(shards)).save(directory)
    return Embeddings.open(directory)


def _empty(name: str, spec: EmbeddingSpec) -> NDArray[Any]:
    if name == "embedding":
        return np.zeros((0, spec.dim), dtype=spec.dtype)
    if name == "digest":
        return np.zeros((0, table.DIGEST_BYTES), dtype=np.uint8)
    return np.zeros(0, dtype=object if name == "key" else np.int64 if name == "label" else np.int32)
