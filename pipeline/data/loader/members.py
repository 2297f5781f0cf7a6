"""Reads all members of a sample, also those that the index does not know, with one read per sample.

The index holds where image, caption and segmentation map are. The rest of a sample lies around them: between the last known
member of the sample before it and the first known member of the one after it. That range is read and its headers are parsed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import storage
from pipeline.data.index import tar
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.reader import Located, Reader, Record, Want
from pipeline.data.order.dataset import lru_get
from pipeline.errors import DataError

_PARTS = ("image", "caption", "segmentation")
_AHEAD = 1 << 16  # bytes read after the last known member, beyond which headers are read one by one
_BEHIND = 8 << 20  # bytes between two samples that are read at once
_MEMBER = 1 << 30  # maximum size of a member, bytes
_SHARDS = 64  # shards whose ranges are cached


class MemberReader(Reader):
    """Fetches samples by number, with all their members. Holds no open file, so it can be sent to other processes.

    Args:
        manifest: index of the samples.
        checksum: compare the image's CRC-32 with the index.
        store: access to the shards.
        only: extensions of the members to return; ``None`` for all.
        wants: the parts of the index to read.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        wants: Iterable[Want] = ("image", "caption", "label", "segmentation"),
        checksum: bool = True,
        store: storage.Storage | None = None,
        only: Iterable[str] | None = None,
    ) -> None:
        super().__init__(manifest, wants=wants, checksum=checksum, store=store)
        self._only = None if only is None else frozenset(only)
        self._ranges: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ranges": OrderedDict()}

    def _contents(self, one: Located) -> dict[str, bytes] | None:
        """The bytes of a sample's parts, and of its members under their extension with a dot before it."""
        try:
            return self._read(one)
        except (storage.StorageUnavailable, storage.ShardChanged):
            raise
        except DataError:
            return None

    def _record(self, one: Located, contents: dict[str, bytes] | None) -> Record:
        record = super()._record(one, contents)
        members = {name[1:]: data for name, data in (contents or {}).items() if name[0] == "."}
        object.__setattr__(record, "members", members)
        return record

    def _locate(self, number: int) -> Located:
        one = super()._locate(number)
        lows, highs = lru_get(self._ranges, number >> 32, _SHARDS, self._of_shard)
        return replace(one, low=int(lows[one.row]), high=int(highs[one.row]))

    def _read(self, one: Located) -> dict[str, bytes]:
        about, key = one.shard.about, one.rows.keys[one.row]
        first = min(offset for offset, _ in one.spans.values())
        last = max(offset + size for offset, size in one.spans.values())
        begin = one.low if first - one.low < _BEHIND else first
        ahead = one.high - last if one.high - last < _BEHIND and one.high < about.size else _AHEAD
        window = _Window(self.store, about, begin, min(last + ahead, about.size))
        contents: dict[str, bytes] = {part: window.read(offset, size) for part, (offset, size) in one.spans.items()}
        known = {offset: contents[part] for part, (offset, _) in one.spans.items()}
        ours = False
        try:
            for member in tar.walk_indexed(window, one.low):
                if member.offset >= one.high:
                    break
                name = tar.split_name(member.name) if member.kind == "file" else None
                if name is None or (name[0] != key and not ours):
                    continue
                if name[0] != key or "." + name[1] in contents:
                    break
                ours = True
                if (self._only is None or name[1] in self._only) and self._reads(member, about.url):
                    data = known.get(member.offset)
                    contents["." + name[1]] = window.read(member.offset, member.size) if data is None else data
        except tar.TarDamage:
            if not ours and "image" not in contents:
                raise
        if not ours:  # its name is in a header that lies before the range
            contents["." + self.manifest.fields.images[0]] = contents["image"]
        return contents

    def _reads(self, member: tar.Member, where: str) -> bool:
        """Whether a member that was asked for is read.

        Raises:
            DataError: it is larger than one read may be.
        """
        if member.size > _MEMBER:
            raise DataError(
                f"member {tar.shown(member.name)} has {member.size} bytes, more than one read may have",
                where=where,
                hint="Leave it out: pass the extensions to read as members",
            )
        return True

    def _of_shard(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns for each accepted sample of a shard where its members may begin, and where they have ended."""
        index = self.manifest.index(number)
        offsets = np.stack([index.columns[f"{part}_offset"] for part in _PARTS])
        sizes = np.stack([index.columns[f"{part}_size"] for part in _PARTS])
        known = sizes > 0
        ends = np.where(known, offsets + sizes, 0).max(axis=0)
        ends = -(-ends // tar.BLOCK) * tar.BLOCK
        starts = np.where(known, offsets, index.size).min(axis=0)
        before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
        after = np.concatenate([np.minimum.accumulate(starts[::-1])[::-1][1:], [index.size]]) if len(starts) else starts
        return before[index.accepted], after[index.accepted]


class _Window:
    """A shard of which one range has been read; the rest is read when it is asked for."""

    def __init__(self, store: storage.Storage, about: storage.ObjectStat, begin: int, end: int) -> None:
        self.url, self.size = about.url, about.size
        self._store, self._about, self._begin = store, about, begin
        self._data = store.read(about, begin, end - begin)

    def read(self, offset: int, length: int) -> bytes:
        at = offset - self._begin
        if at >= 0 and at + length <= len(self._data):
            return self._data[at : at + length]
        return self._store.read(self._about, offset, length)

    def close(self) -> None:
        """Nothing is open."""
