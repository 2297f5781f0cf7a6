"""What the data of a run cost before it runs: shards and bytes that nodes download, cache, index.

The laws follow from the order (:mod:`pipeline.data.order.dataset`): a stream is a contiguous part of the shuffled shards, read in
blocks, so that a node reads as many contiguous pieces as it has streams. Shards are taken to be equal.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.data import storage
from pipeline.data.index.build import index_shard
from pipeline.data.index.fields import Fields
from pipeline.data.index.manifest import CACHE_BYTES, Manifest
from pipeline.data.index.shard_table import FILE, Shard, ShardTable
from pipeline.data.index.sidecar import COLUMNS
from pipeline.errors import ConfigError

_COPIES = 64  # of a summary, in the table whose size is measured
_ROW = sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values())  # bytes of a sample's row in memory, without its key


@dataclass(frozen=True)
class Part:
    """One data set of a run.

    Attributes:
        samples: usable samples.
        shards: number of shards.
        size: bytes of all shards.
        fraction: its fraction of the samples of a batch.
    """

    samples: int
    shards: int
    size: int
    fraction: float = 1.0


@dataclass(frozen=True)
class Reading:
    """The order of a run, and its nodes.

    Attributes:
        parts: the data sets.
        global_batch: samples per step, over all nodes.
        streams: number of streams of the order.
        block_size: samples that are shuffled together in a stream.
        nodes: nodes that share a batch as evenly as possible.

    Raises:
        ConfigError: a data set has fewer samples than a batch, or one of several fewer than there are streams.
    """

    parts: tuple[Part, ...]
    global_batch: int
    streams: int
    block_size: int
    nodes: int = 1

    def __post_init__(self) -> None:
        need, what = (self.global_batch, "one global batch") if len(self.parts) == 1 else (self.streams, "the streams")
        for part in self.parts:
            if part.samples < need:
                raise ConfigError(
                    f"a data set of {part.samples} samples in {part.shards} shards has fewer than {what} of {need}",
                    where="data",
                    hint="Add shards or lower train.global_batch_size",
                )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the data set that is finished first."""
        each = self.global_batch // self.streams
        return max(1, min(int(part.samples // self.streams / (each * part.fraction)) for part in self.parts))

    def node_streams(self, node: int) -> int:
        """Number of streams that a node reads."""
        each = self.global_batch // self.streams
        first, last = (self.global_batch * (node + more) // self.nodes for more in (0, 1))
        return -(-last // each) - first // each if last > first else 0

    def shards(self, first: int, last: int, node: int = 0) -> float:
        """Expected number of shards that a node needs for the steps ``[first, last)`` of an epoch."""
        return sum(count for count, _ in self._needed(first, last, node))

    def bytes(self, first: int, last: int, node: int = 0) -> float:
        """Expected bytes of the shards that a node needs for the steps ``[first, last)`` of an epoch."""
        return sum(count * size for count, size in self._needed(first, last, node))

    def _needed(self, first: int, last: int, node: int) -> list[tuple[float, float]]:
        streams, each = self.node_streams(node), self.global_batch // self.streams
        pairs = []
        for part in self.parts:
            span = part.samples // self.streams
            low, high = (min(step * each * part.fraction, span) for step in (first, last))
            begin = int(low // self.block_size) * self.block_size
            end = min(-(-high // self.block_size) * self.block_size, span)
            pairs.append((_touched(part, streams, max(end - begin, 1.0), span), part.size / part.shards))
        return pairs

    def amplification(self, first: int, last: int) -> float:
        """Bytes that all nodes download for the steps ``[first, last)`` of an epoch, for each byte of the samples they use."""
        down = sum(self.bytes(first, last, node) for node in range(self.nodes))
        used = sum(part.fraction * part.size / part.samples for part in self.parts) * (last - first) * self.global_batch
        return down / used

    @property
    def cache(self) -> float:
        """Bytes of cache with which no shard of a node is downloaded twice in an epoch: the block in use, and two ahead."""
        ahead = max(2 * self.block_size * self.streams // self.global_batch, 1)
        half = ahead // 4
        return max(self.bytes(half, half + ahead, node) for node in {0, self.nodes - 1})

    def fewer_streams(self, most: int) -> int | None:
        """Largest number of streams with which no node needs more shards for its first step; ``None`` if there is none.

        Args:
            most: shards.
        """
        divisors = (n for n in range(self.streams, 0, -1) if self.global_batch % n == 0)
        return next((n for n in divisors if replace(self, streams=n).shards(0, 1) <= most), None)


def _touched(part: Part, streams: int, length: float, span: int) -> float:
    """Expected number of shards of pieces of some length that begin ``span`` samples apart, at a random place."""
    if not streams:
        return 0.0
    shard = part.samples / part.shards
    apart = max(0.0, 1 - (span - length + 1) / shard)  # probability that a piece ends in the shard in which the next one begins
    return min(streams * (1 + (length - 1) / shard) - (streams - 1) * apart, part.shards)


@dataclass(frozen=True)
class IndexCost:
    """Cost of the first index of a data set, and of what processes hold of it.

    Attributes:
        read: bytes that it reads, all of them once.
        cpu: CPU seconds; ``None`` if nothing was measured.
        mapped: bytes of the table of shards, which the processes of a node share.
        per_row: bytes of a sample's row in a process that reads its shard.
    """

    read: int
    cpu: float | None
    mapped: float
    per_row: float

    def seconds(self, cores: int, machines: int = 1) -> float | None:
        """Seconds on that many cores of each of some machines, if storage is fast enough."""
        return None if self.cpu is None else self.cpu / (cores * machines)

    def rows(self, samples: float) -> float:
        """Bytes of the rows that one process keeps while it reads shards of so many samples."""
        return min(self.per_row * samples, float(CACHE_BYTES))


def of_manifest(manifest: Manifest) -> IndexCost:
    """Cost of an index that is there."""
    mapped = (Path(manifest.directory) / FILE).stat().st_size
    key = np.mean([manifest.rows(number).keys.nbytes / max(int(manifest.sizes[number]), 1) for number in _spread(manifest, 3)])
    return IndexCost(int(manifest.shards.sizes.sum()), None, mapped, _ROW + float(key))


def _spread(manifest: Manifest, count: int) -> list[int]:
    filled = np.flatnonzero(np.asarray(manifest.sizes))
    return [int(filled[at * len(filled) // count]) for at in range(min(count, len(filled)))]


def surveyed(abouts: Sequence[storage.ObjectStat], fields: Fields, store: storage.Storage, count: int) -> tuple[Part, IndexCost]:
    """Estimates a data set from a few of its shards, which are indexed for it; nothing is kept.

    Args:
        abouts: all shards.
        fields: which members make a sample.
        store: access to the shards.
        count: how many are read, evenly spread.

    Raises:
        ConfigError: they have no usable sample.
        DataError: one of them cannot be indexed.
    """
    chosen = [abouts[at * len(abouts) // count] for at in range(min(count, len(abouts)))]
    begin = time.process_time()
    indexes = [index_shard(about, fields=fields, store=store) for about in chosen]
    shards = [Shard.of(index) for index in indexes]
    cpu, read = time.process_time() - begin, sum(about.size for about in chosen)
    samples, size = sum(shard.samples for shard in shards), sum(about.size for about in abouts)
    if not samples:
        raise ConfigError(f"{len(shards)} shards have no usable sample", where="data.shards", hint="Read more of them")
    few, many = (_table_bytes(shards * copies, fields) for copies in (1, _COPIES))
    each = (many - few) / (len(shards) * (_COPIES - 1))
    keys = sum(index.keys.nbytes for index in indexes) / max(sum(len(index.keys) for index in indexes), 1)
    part = Part(max(round(samples * size / read), 1), len(abouts), size)
    return part, IndexCost(size, cpu * size / read, few + each * (len(abouts) - len(shards)), _ROW + keys)


def _table_bytes(shards: Sequence[Shard], fields: Fields) -> int:
    with tempfile.TemporaryDirectory(prefix="fovea-estimate-") as folder:
        return (Path(Manifest(folder, ShardTable.of(shards, fields), fields).save(folder).directory) / FILE).stat().st_size


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
