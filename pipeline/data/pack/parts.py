"""One part of a source, so that several machines share a packing."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.pack.members import digest_of
from pipeline.data.pack.samples import Raw, Source
from pipeline.errors import ConfigError


class SourcePart:
    """Every ``count``-th sample of a source, from the ``number``-th on; see :class:`pipeline.data.pack.samples.Source`.

    What belongs to no sample is counted by the first part, so that the accounts of all parts sum to that of the source. One
    exception: a caption that images of several parts share counts as packed, by the part of the first of them, also if all of
    them are left out, since no part knows that.

    Args:
        source: all samples.
        number: of the part, from 1.
        count: of parts.

    Raises:
        ConfigError: the part has no sample.
    """

    def __init__(self, source: Source, number: int, count: int) -> None:
        self._source, self._number, self._count = source, number, count
        self._positions = range(number - 1, len(source), count)
        if not self._positions:
            hint = "Use fewer parts"
            raise ConfigError(f"part {number} of {count} is empty: there are {len(source)} samples", where="--part", hint=hint)
        self.unit, self.remarks, self.max_file, self.classes = source.unit, source.remarks, source.max_file, source.classes
        self.digest = digest_of("part", [source.digest, f"{number}/{count}"])
        self.left_out: Sequence[tuple[str, str]] = source.left_out if number == 1 else ()

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Those of the part's samples; of a table, which names rows, those of the first part."""
        if self.unit == "rows":
            return list(self._source.notes) if self._number == 1 else []
        names = {self._source.name(position) for position in self._positions}
        return [(name, note) for name, note in self._source.notes if name in names]

    def __len__(self) -> int:
        return len(self._positions)

    def name(self, position: int) -> str:
        """Returns the display name of a sample."""
        return self._source.name(self._positions[position])

    def companions(self, position: int) -> Sequence[str]:
        """Returns the names of the files or members beside the image that are counted as this sample's."""
        return self._source.companions(self._positions[position])

    def sharers(self, companion: str) -> Sequence[str]:
        """Returns the names of all samples that share a companion."""
        return self._source.sharers(companion)

    def key(self, position: int, number: int) -> str:
        """Returns the key of a sample; numbers of different parts are different keys."""
        own = self._positions[position]
        return self._source.key(own, number * self._count + self._number - 1)

    def load(self, position: int) -> Raw:
        """Reads a sample."""
        return self._source.load(self._positions[position])
