"""Shuffles one data set into endless streams of samples; a pure function of the position.

One epoch: the shards are shuffled and concatenated, the start is shifted by a random amount, and the result is split into
streams of equal length. Inside a stream, blocks of samples are shuffled. The remainder (fewer samples than streams) is dropped;
because of the shift it differs between epochs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.random import mix, permutation
from pipeline.errors import DataError

_SHARDS, _SHIFT, _BLOCK = 0x5AAD, 0x5817, 0xB10C  # identify the random draws
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Epoch:
    """One pass over a data set.

    Attributes:
        shards: the shards in shuffled order, int64 ``[shards]``.
        counts: samples of each shard in this epoch, by shard number, int64 ``[shards]``.
        ends: end of each shuffled shard in the concatenation, int64 ``[shards]``.
        shift: where in the concatenation the first stream begins.
        origin: of a weighted data set, where the first sample is drawn; see :mod:`pipeline.data.order.weighted`.
    """

    shards: NDArray[np.int64]
    counts: NDArray[np.int64]
    ends: NDArray[np.int64]
    shift: int
    origin: int = 0


class ShuffledDataset:
    """One data set as endless streams.

    Args:
        counts: accepted samples of each shard, int64 ``[shards]``.
        seed: seed of the order.
        streams: number of streams; not more than there are samples.
        block_size: samples that are shuffled together inside a stream.

    Attributes:
        counts: as given.
        total: number of samples.
        span: samples of a stream in one epoch.
    """

    def __init__(self, counts: NDArray[np.int64], seed: int, streams: int, block_size: int) -> None:
        self.counts = counts
        self.total = int(self.counts.sum())
        self.span = self.total // streams
        self._seed, self._streams, self._block_size = seed, streams, block_size
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], NDArray[Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": OrderedDict(), "_blocks": OrderedDict()}

    def samples(
        self, streams: Sequence[int], starts: Sequence[int], counts: Sequence[int]
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Returns runs of consecutive samples of the streams, concatenated, and the epoch of each sample.

        Args:
            streams: the stream of each run.
            starts: the position in that stream at which a run begins, from 0 over all epochs.
            counts: the length of each run.

        Returns:
            uint64 ``[n]``, ``shard << 32 | row``, and int64 ``[n]``.
        """
        slots: dict[int, list[NDArray[np.int64]]] = {}
        targets: dict[int, list[NDArray[np.int64]]] = {}
        done = 0
        for stream, start, count in zip(streams, starts, counts, strict=True):
            end = start + count
            while start < end:
                epoch, position = divmod(start, self.span)
                take = min(end - start, self.span - position)
                slots.setdefault(epoch, []).append(self._slots(epoch, stream, position, take))
                targets.setdefault(epoch, []).append(np.arange(done, done + take))
                start, done = start + take, done + take
        ids, epochs = np.empty(done, dtype=np.uint64), np.empty(done, dtype=np.int64)
        for epoch in sorted(slots):
            rows = np.concatenate(targets[epoch])
            ids[rows], epochs[rows] = self._ids(epoch, np.concatenate(slots[epoch]))
        return ids, epochs

    def positions_of(self, number: int, first: int, last: int) -> list[tuple[int, int]]:
        """Returns the (position, stream) pairs at which a sample occurs, for positions in ``[first, last)``.

        Raises:
            DataError: there is no such sample.
        """
        shard, row = number >> 32, number & 0xFFFFFFFF
        if shard >= len(self.counts) or row >= self.counts[shard]:
            raise DataError(f"there is no sample {number}", where="order", hint="Use numbers of this manifest")
        pairs = []
        for epoch in range(first // self.span, -(-last // self.span)):
            now = lru_get(self._epochs, epoch, 3, self._epoch)
            index = int(np.flatnonzero(now.shards == shard)[0])
            begin = int(now.ends[index] - now.counts[shard])
            for turn in self._turns(now, shard, row):
                stream, slot = divmod((begin + turn - now.shift) % self.total, self.span)
                if stream >= self._streams:
                    continue  # part of this epoch's remainder
                block, offset = divmod(slot, self._block_size)
                within = int(np.flatnonzero(self._shuffled(epoch, stream, block) == offset)[0])
                position = epoch * self.span + block * self._block_size + within
                if first <= position < last:
                    pairs.append((position, stream))
        return pairs

    def uses(self, first: int, last: int, streams: range) -> Iterator[tuple[int, int]]:
        """Yields shards with the position at which their block begins, for positions ``[first, last)`` of some streams.

        Pairs of position (not below ``first``) and shard, by position; a shard occurs once for each block and stream.
        """
        while first < last:
            epoch, position = divmod(first, self.span)
            number = position // self._block_size
            size = min(self._block_size, self.span - number * self._block_size)
            now = lru_get(self._epochs, epoch, 3, self._epoch)
            ends = now.ends
            for stream in streams:
                begin = (stream * self.span + number * self._block_size + now.shift) % self.total
                for low, high in ((begin, min(begin + size, self.total)), (0, begin + size - self.total)):
                    if low < high:
                        used = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high - 1, side="right") + 1)
                        yield from ((first, int(shard)) for shard in now.shards[used] if now.counts[shard])
            first = epoch * self.span + number * self._block_size + size

    def _slots(self, epoch: int, stream: int, position: int, take: int) -> NDArray[np.int64]:
        """Returns the slots in the epoch of a stream's samples ``position`` to ``position + take``, before the shift."""
        parts = []
        while take > 0:
            number, index = divmod(position, self._block_size)
            shuffled = self._shuffled(epoch, stream, number)[index : index + take]
            parts.append(shuffled.astype(np.int64) + (stream * self.span + number * self._block_size))
            position, take = position + len(shuffled), take - len(shuffled)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _ids(self, epoch: int, slots: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64] | int]:
        """Returns the samples in some slots of an epoch, and the pass over each sample that this is."""
        now = lru_get(self._epochs, epoch, 3, self._epoch)
        slots = (slots + now.shift) % self.total
        index = np.searchsorted(now.ends, slots, side="right")
        shard = now.shards[index]
        rows, passes = self._rows(epoch, now, shard, slots - (now.ends[index] - now.counts[shard]))
        return (shard.astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64), passes

    def _rows(
        self, epoch: int, now: Epoch, shards: NDArray[np.int64], turns: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | int]:
        """Returns the rows that have some turns in their shards, and the pass over each sample."""
        return turns, epoch

    def _turns(self, now: Epoch, shard: int, row: int) -> range:
        """Returns the turns that a row of a shard has in an epoch."""
        return range(row, row + 1)

    def _epoch(self, epoch: int) -> Epoch:
        shards = permutation(len(self.counts), self._seed, epoch, _SHARDS)
        low, high = mix(self._seed, epoch, _SHIFT)
        return Epoch(shards, self.counts, np.cumsum(self.counts[shards]), (high << 32 | low) % self.total)

    def _shuffled(self, epoch: int, stream: int, number: int) -> NDArray[Any]:
        def draw(key: tuple[int, int, int]) -> NDArray[Any]:
            size = min(self._block_size, self.span - number * self._block_size)
            return permutation(size, self._seed, *key, _BLOCK).astype(np.min_scalar_type(size))

        return lru_get(self._blocks, (epoch, stream, number), 2 * self._streams + 2, draw)


def lru_get(cache: OrderedDict[_Key, _Value], key: _Key, limit: int, make: Callable[[_Key], _Value]) -> _Value:
    """Returns ``make(key)`` from a cache of the last ``limit`` results."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    value = cache[key] = make(key)
    while len(cache) > limit:
        cache.popitem(last=False)
    return value
