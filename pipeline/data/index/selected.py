"""Which rows of an index a selection keeps, and how often each occurs in an epoch: arrays that the processes of a node share."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import storage
from pipeline.data.index.arrays import map_arrays
from pipeline.errors import DataError
from pipeline.untrusted import printable

UNIT = 1 << 16  # weight 1
MAX_WEIGHT = 1000.0
_ARRAYS = {
    "rows": np.uint32,
    "units": np.uint32,
    "samples": np.int64,
    "totals": np.int64,
    "largest": np.uint32,
    "checksums": np.uint32,
}


class SelectedRows:
    """Rows of all shards of an index that a selection keeps.

    Args:
        path: the file.

    Raises:
        DataError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            arrays = map_arrays(path, _ARRAYS)
            self._rows, self._units = arrays["rows"], arrays["units"]
            self._samples, self._totals = arrays["samples"], arrays["totals"]
            self._largest, self._checksums = arrays["largest"], arrays["checksums"]
            shards = len(self._samples)
            if (
                any(len(arrays[name]) != shards for name in ("totals", "largest", "checksums"))
                or self._samples.min(initial=0) < 0
            ):
                raise ValueError("columns are of unequal length")
            if int(self._samples.sum()) != len(self._rows) or len(self._units) not in (0, len(self._rows)):
                raise ValueError("numbers of samples do not agree")
        except (OSError, ValueError) as error:
            raise self._damaged(printable(str(error), limit=160)) from error

    def __reduce__(self) -> tuple[Callable[..., SelectedRows], tuple[Any, ...]]:
        return SelectedRows, (self._path,)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self._samples)

    def rows(self, shard: int) -> NDArray[np.uint32]:
        """Returns the rows of a shard that are kept, ascending, ``[samples]``: positions among the accepted ones of the index.

        Raises:
            DataError: the file has other shards, or is damaged.
        """
        rows = self._part(self._rows, shard)
        if _checksum(rows, self._part(self._units, shard)) != self._checksums[shard]:
            raise self._damaged("a checksum does not match")
        return rows

    def weights(self, first: int, shards: int) -> RowWeights | None:
        """Returns the weights of the samples of some shards; ``None`` if each has weight 1.

        Args:
            first: the first of the shards.
            shards: their number.
        """
        part = slice(first, first + shards)
        plain = (self._totals[part] == UNIT * self._samples[part]).all() and self._largest[part].max(initial=0) <= UNIT
        return None if plain else RowWeights(self, first, shards)

    @property
    def weights_digest(self) -> str | None:
        """Hash of all weights, 64 bits in hex; ``None`` if each sample has weight 1."""
        if not len(self._units):
            return None
        content = b"".join(column.tobytes() for column in (self._samples, self._totals, self._checksums))
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def units(self, shard: int) -> NDArray[np.uint32]:
        """Returns the weights of the kept rows of a shard, in units of 1/65536, ``[samples]``.

        Raises:
            DataError: the file has other shards, or is damaged.
        """
        rows = self.rows(shard)
        units = self._part(self._units, shard) if len(self._units) else np.full(len(rows), UNIT, dtype=np.uint32)
        if int(units.sum(dtype=np.int64)) != self._totals[shard]:
            raise self._damaged("a sum of weights does not match")
        return units

    def totals(self, first: int, shards: int) -> NDArray[np.int64]:
        """Returns the sums of the weights of some shards, in units of 1/65536, ``[shards]``."""
        return self._totals[first : first + shards]

    def largest(self, first: int, shards: int) -> int:
        """Returns the largest weight in some shards, in units of 1/65536."""
        return int(self._largest[first : first + shards].max(initial=0))

    def _part(self, column: NDArray[np.uint32], shard: int) -> NDArray[np.uint32]:
        if shard >= len(self._samples):
            raise self._damaged(f"there is no shard {shard}")
        return column[int(self._ends[shard] - self._samples[shard]) : int(self._ends[shard])]

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"rows of the selection are missing or damaged ({reason})",
            where=printable(str(self._path)),
            hint="Remove this file: it is derived from data.selection",
        )


class RowWeights:
    """Weights of the samples of some shards; see :class:`pipeline.data.order.weighted.SampleWeights`."""

    def __init__(self, selected: SelectedRows, first: int, shards: int) -> None:
        self._selected, self._first, self._shards = selected, first, shards

    @property
    def totals(self) -> NDArray[np.int64]:
        """Sum of the weights of each shard, ``[shards]``."""
        return self._selected.totals(self._first, self._shards)

    @property
    def largest(self) -> int:
        """The largest weight."""
        return self._selected.largest(self._first, self._shards)

    def of(self, shard: int) -> NDArray[np.uint32]:
        """Returns the weights of the rows of a shard, ``[samples]``."""
        return self._selected.units(self._first + shard)


def save_selected(path: Path, shards: Iterable[tuple[NDArray[np.uint32], NDArray[np.uint32]]]) -> None:
    """Writes the kept rows and their weights atomically.

    Args:
        path: the file.
        shards: rows and weights in units of 1/65536 of each shard.
    """
    parts = [(rows.astype(np.uint32), units.astype(np.uint32)) for rows, units in shards]
    if all(bool((units == UNIT).all()) for _, units in parts):
        parts = [(rows, units[:0]) for rows, units in parts]
    plain = not any(len(units) for _, units in parts)
    empty = np.empty(0, dtype=np.uint32)
    arrays: dict[str, Any] = {
        "rows": np.concatenate([empty, *(rows for rows, _ in parts)]),
        "units": np.concatenate([empty, *(units for _, units in parts)]),
        "samples": np.array([len(rows) for rows, _ in parts], dtype=np.int64),
        "totals": np.array([len(rows) * UNIT if plain else units.sum(dtype=np.int64) for rows, units in parts], dtype=np.int64),
        "largest": np.array([UNIT if plain else units.max(initial=0) for _, units in parts], dtype=np.uint32),
        "checksums": np.array(
            [zlib.crc32(units.tobytes(), zlib.crc32(rows.tobytes())) for rows, units in parts], dtype=np.uint32
        ),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    os.makedirs(path.parent, exist_ok=True)
    storage.write_atomically(path, buffer.getvalue())


def _checksum(rows: NDArray[np.uint32], units: NDArray[np.uint32]) -> int:
    return zlib.crc32(units.tobytes(), zlib.crc32(rows.tobytes()))
