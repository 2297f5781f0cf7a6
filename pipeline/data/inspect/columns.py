"""Counts the values of metadata in the JSON members of samples: which columns a data set has, and which values they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pipeline.data import storage
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.columns import JsonReader, parse_columns
from pipeline.errors import DataError
from pipeline.masking import UNPRINTABLE, printable
from pipeline.untrusted import plain_value

MOST_VALUES = 256
_MOST_COLUMNS = 200
_MOST_NAME = 64  # characters
_AT_ONCE = 64  # samples


@dataclass
class Columns:
    """What was seen.

    Attributes:
        samples: number of samples that were read.
        of: number of samples of the data set.
        values: samples with each value, by column; of a column with more values than 256 some are not listed.
    """

    samples: int = 0
    of: int = 0
    values: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, about: dict[str, object]) -> None:
        """Counts one sample's values."""
        self.samples += 1
        for name, value in about.items():
            text = plain_value(value)
            if text is None or not 0 < len(name) <= _MOST_NAME or UNPRINTABLE.search(name):
                continue
            if name not in self.values and len(self.values) >= _MOST_COLUMNS:
                continue
            counts = self.values.setdefault(name, Counter())
            if text in counts or len(counts) <= MOST_VALUES:
                counts[text] += 1

    def require(self, name: str, *, where: str = "guidance.columns") -> None:
        """Rejects a column that no sample has.

        Raises:
            DataError: with the columns that there are.
        """
        if name in self.values:
            return
        few = [column for column, counts in self.values.items() if 2 <= len(counts) <= MOST_VALUES]
        raise DataError(
            f"no column {printable(repr(name), limit=80)} in the JSON of {self.samples} samples"
            f" (of {self.of}); there are {shortened(self.values) or 'none'}",
            where=where,
            hint=f"Choose one of {shortened(few)}" if few else "Add to each sample a member KEY.json with such a column",
        )


def shortened(names: Iterable[str], most: int = 20) -> str:
    """The first names or values of a list, as text."""
    known = sorted(names)
    return ", ".join(printable(repr(name), limit=60) for name in known[:most]) + (", …" if len(known) > most else "")


def columns_of(manifest: Manifest, store: storage.Storage, *, most: int) -> Columns:
    """Counts values in the JSON members of some samples.

    Args:
        manifest: index of the data set.
        store: access to its shards.
        most: number of samples that are read, evenly spread over the data set.
    """
    reader = JsonReader(manifest, wants=("image",), checksum=False, store=store)
    total = manifest.total
    chosen = np.unique(np.linspace(0, max(total - 1, 0), min(total, most)).astype(np.int64))
    seen = Columns(of=total)
    for low in range(0, len(chosen), _AT_ONCE):
        for record in reader.fetch(manifest.ids(chosen[low : low + _AT_ONCE])):
            seen.add(parse_columns(record.members.get(manifest.fields.json)))
    return seen
