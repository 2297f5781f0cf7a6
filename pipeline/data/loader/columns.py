"""Reads columns of metadata: values of the JSON member of a sample, numbered by declared lists of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from typing_extensions import override

from pipeline.data import storage
from pipeline.data.index import tar
from pipeline.data.index.captions import decode_text
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.members import MemberReader
from pipeline.data.loader.reader import Located, Record, Want
from pipeline.untrusted import parse_json, plain_value

_LARGEST = 1 << 20  # bytes of a JSON member, beyond which it is not read


def parse_columns(data: bytes | None) -> dict[str, Any]:
    """Returns the object in a JSON member; an empty one without a member, and for what is not JSON, too deep or no object."""
    if data is None:
        return {}
    try:
        document = parse_json(decode_text(data)[0])
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


class JsonReader(MemberReader):
    """Fetches samples with their JSON member, unless it is larger than a megabyte.

    Args:
        manifest: index of the samples.
        wants: the parts of the index to read.
        checksum: compare the image's CRC-32 with the index.
        store: access to the shards.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        wants: Iterable[Want] = ("image", "caption", "label"),
        checksum: bool = True,
        store: storage.Storage | None = None,
    ) -> None:
        super().__init__(manifest, wants=wants, checksum=checksum, store=store, only=(manifest.fields.json,))

    @override
    def _reads(self, member: tar.Member, where: str) -> bool:
        return member.size <= _LARGEST


class ColumnReader(JsonReader):
    """Fetches samples with the numbers of their values. A value that is not declared is missing, as is one that cannot be read.

    Args:
        manifest: index of the samples.
        columns: the values of each column by its key in the JSON object, see :func:`pipeline.untrusted.plain_value`; a value's
            position is its number.
        checksum: compare the image's CRC-32 with the index.
        store: access to the shards.
    """

    def __init__(
        self,
        manifest: Manifest,
        columns: Mapping[str, Sequence[str]],
        *,
        checksum: bool = True,
        store: storage.Storage | None = None,
    ) -> None:
        super().__init__(manifest, checksum=checksum, store=store)
        self.columns = tuple(columns)
        self._numbers = {name: {value: number for number, value in enumerate(values)} for name, values in columns.items()}

    @override
    def _record(self, one: Located, contents: dict[str, bytes] | None) -> Record:
        record = super()._record(one, contents)
        about = parse_columns(record.members.get(self.manifest.fields.json))
        numbers = {name: known.get(plain_value(about.get(name)) or "") for name, known in self._numbers.items()}
        object.__setattr__(record, "members", {})
        object.__setattr__(record, "values", {name: number for name, number in numbers.items() if number is not None})
        return record
