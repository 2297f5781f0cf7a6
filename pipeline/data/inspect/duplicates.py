"""Finds images that occur more than once, in bounded memory: large sets are divided by a hash into temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PART = 1 << 22  # samples that are compared at a time: 80 MB
_EXAMPLES, _PLACES = 5, 4
_RECORD = np.dtype([("hash", "<u8"), ("row", "<u8"), ("label", "<i4")])

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Groups:
    """Images that occur more than once.

    Attributes:
        count: number of such images.
        superfluous: samples that deduplication would remove.
        labels_differ: how many of these images have several class indices.
        examples: of the first few images, the numbers of at most four samples, counted over all shards.
    """

    count: int = 0
    superfluous: int = 0
    labels_differ: int = 0
    examples: tuple[tuple[int, ...], ...] = ()


def find(shards: Iterable[Columns], total: int, folder: Path, *, part: int = PART) -> Groups:
    """Group samples whose images are equal: checksum, size and sides.

    Samples are compared by a hash of 64 bits, which two of five billion different images share with a probability of a half.

    Args:
        shards: the columns ``crc32``, ``image_size``, ``width``, ``height`` and ``label`` of each shard, in order.
        total: number of samples.
        folder: where temporary files of 20 bytes per sample are made if there are more than ``part``.
        part: number of samples to compare at a time.

    Raises:
        OSError: the temporary files cannot be written.
    """
    count = 1 << max((total - 1) // part, 0).bit_length()
    if count == 1:
        records = [np.zeros(0, _RECORD), *_records(shards)]
        return _groups(np.concatenate(records))
    with tempfile.TemporaryDirectory(prefix=".duplicates-", dir=folder) as name:
        waiting: list[NDArray[Any]] = []
        for records_of_shard in _records(shards):
            waiting.append(records_of_shard)
            if sum(map(len, waiting)) >= part:
                _divide(Path(name), np.concatenate(waiting), count)
                waiting = []
        if waiting:
            _divide(Path(name), np.concatenate(waiting), count)
        parts = [_groups(np.fromfile(path, _RECORD)) for path in sorted(Path(name).iterdir())]
    return Groups(
        sum(one.count for one in parts),
        sum(one.superfluous for one in parts),
        sum(one.labels_differ for one in parts),
        tuple(sorted(example for one in parts for example in one.examples)[:_EXAMPLES]),
    )


def _records(shards: Iterable[Columns]) -> Iterable[NDArray[Any]]:
    first = 0
    for columns in shards:
        records = np.zeros(len(columns["crc32"]), _RECORD)
        sides = columns["width"].astype(np.uint64) << np.uint64(32) | columns["height"].astype(np.uint64)
        content = columns["image_size"].astype(np.uint64) << np.uint64(32) ^ columns["crc32"].astype(np.uint64)
        records["hash"] = _mixed(_mixed(content) ^ sides)
        records["row"] = np.arange(first, first + len(records), dtype=np.uint64)
        records["label"] = columns["label"]
        first += len(records)
        yield records


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits in which each bit depends on all (the finalizer of splitmix64)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _divide(folder: Path, records: NDArray[Any], count: int) -> None:
    """Append records to the file of their part, which the first bits of the hash determine."""
    part = records["hash"] >> np.uint64(64 - count.bit_length() + 1)
    order = np.argsort(part, kind="stable")
    ends = np.searchsorted(part[order], np.arange(count + 1))
    for number in range(count):
        chosen = records[order[ends[number] : ends[number + 1]]]
        if len(chosen):
            with (folder / f"{number:06d}").open("ab") as file:
                chosen.tofile(file)


def _groups(records: NDArray[Any]) -> Groups:
    """The groups among all records with some hashes."""
    if not len(records):
        return Groups()
    records = records[np.lexsort((records["row"], records["hash"]))]
    group = np.cumsum(np.concatenate([[0], records["hash"][1:] != records["hash"][:-1]]))
    several = np.bincount(group)[group] > 1
    records, group = records[several], group[several]
    if not len(records):
        return Groups()
    starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    lengths = np.diff(np.append(starts, len(records)))
    differ = np.minimum.reduceat(records["label"], starts) != np.maximum.reduceat(records["label"], starts)
    first = np.argsort(records["row"][starts])[:_EXAMPLES]
    examples = [records["row"][starts[i] : starts[i] + min(int(lengths[i]), _PLACES)] for i in first]
    return Groups(
        len(starts), int((lengths - 1).sum()), int(differ.sum()), tuple(tuple(int(row) for row in rows) for rows in examples)
    )
