"""Global sample order: a pure function of the step number.

A fixed number of *lanes* (setting ``data.canonical_streams``) partition the data set; every global batch takes the same number of
samples from each lane. A rank owns consecutive lanes, so the world size determines which rank reads a sample, never when it
occurs. Nothing here has state: resuming means asking for another step.

One epoch: the shards are shuffled and concatenated, the start is shifted by a random amount, and the result is split into lanes
of equal length. Inside a lane, blocks of samples are shuffled. The remainder (fewer samples than lanes) is dropped; because of
the shift it differs between epochs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.random import mix, permutation
from pipeline.errors import ConfigError, DataError

_SHARDS, _SHIFT, _BLOCK = 0x5AAD, 0x5817, 0xB10C  # identify the random draws
_DEFAULT_LANES = 256
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step, or one rank's part of them, in order.

    Attributes:
        ids: uint64 ``[n]``, ``shard << 32 | row``.
        epochs: int64 ``[n]``, the epoch each sample belongs to.
    """

    ids: NDArray[np.uint64]
    epochs: NDArray[np.int64]


class Order:
    """An endless, seekable stream of global batches.

    Args:
        counts: accepted samples of each shard.
        seed: seed of the order.
        global_batch: samples per step, over all ranks.
        lanes: number of lanes; must divide the global batch, and be a multiple of the world size. None: the greatest common
            divisor of the global batch and 256.
        block: samples that are shuffled together inside a lane.

    Raises:
        ConfigError: sizes that do not divide; the message lists those that would.
        DataError: fewer samples than one global batch.
    """

    def __init__(self, counts: Sequence[int], seed: int, global_batch: int, lanes: int | None = None, block: int = 16384) -> None:
        lanes = num_streams(global_batch, lanes, block)
        self._counts = np.asarray(counts, dtype=np.int64)
        self._total = int(self._counts.sum())
        if self._total < global_batch:
            raise DataError(
                f"{self._total} usable samples are fewer than one global batch of {global_batch}",
                where="data",
                hint="Add shards or make the global batch smaller.",
            )
        self.seed, self.global_batch, self.lanes, self.block = seed, global_batch, lanes, block
        self._each = global_batch // lanes
        self._span = self._total // lanes
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64], int]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], NDArray[Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": OrderedDict(), "_blocks": OrderedDict()}

    @property
    def total(self) -> int:
        """Number of samples."""
        return self._total

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch: all but the remainder, which is smaller than the number of lanes."""
        return self._span * self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Complete steps in one epoch; epochs follow each other without a gap, so a step may span two."""
        return self._span // self._each

    def epoch_of(self, step: int) -> int:
        """Returns the epoch of the first sample of a step."""
        return step * self._each // self._span

    def check_world(self, world: int) -> None:
        """Rejects a world size that does not divide the number of lanes.

        Raises:
            ConfigError: the message lists the valid ones.
        """
        rank_slice(self.lanes, world, 0)

    def batch(self, step: int) -> GlobalBatch:
        """Returns the global batch of a step, lane by lane: ``[global_batch]``."""
        return self._of_lanes(step, 0, self.lanes)

    def rank_batch(self, step: int, world: int, rank: int) -> GlobalBatch:
        """Returns one rank's contiguous part of :meth:`batch`: ``[global_batch / world]``.

        Raises:
            ConfigError: an invalid world size, or no such rank.
        """
        share = rank_slice(self.lanes, world, rank)
        return self._of_lanes(step, share.start, share.stop)

    def steps_of(self, number: int, first: int, last: int) -> list[int]:
        """Returns the steps in ``[first, last)`` that contain a sample, by inverting the permutation of each epoch.

        Args:
            number: the sample, ``shard << 32 | row``.
            first: the first step.
            last: one past the last.

        Raises:
            DataError: there is no such sample.
        """
        steps = (position // self._each for position, _ in self.positions_of(number, first * self._each, last * self._each))
        return sorted(steps)

    def shards(self, first: int, last: int, lanes: range | None = None) -> list[int]:
        """Returns the shards that steps in ``[first, last)`` read, in the order of first use.

        Derived from the blocks that the steps touch, without drawing samples. Shards may be listed that only other steps of the
        same block read, but none is missing.

        Args:
            first: the first step.
            last: one past the last.
            lanes: restrict to these lanes, such as a rank's or a node's; None: all.
        """
        lanes = range(self.lanes) if lanes is None else lanes
        return in_order(self.uses(first * self._each, last * self._each, lanes))

    def lane_samples(self, lanes: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> GlobalBatch:
        """Returns runs of consecutive samples of the lanes' endless streams, concatenated.

        Args:
            lanes: the lane of each run.
            starts: the position in that lane at which a run begins, from 0 over all epochs.
            counts: the length of each run.
        """
        places: dict[int, list[NDArray[np.int64]]] = {}
        where: dict[int, list[NDArray[np.int64]]] = {}
        done = 0
        for lane, start, count in zip(lanes, starts, counts, strict=True):
            end = start + count
            while start < end:
                epoch, position = divmod(start, self._span)
                take = min(end - start, self._span - position)
                places.setdefault(epoch, []).append(self._places(epoch, lane, position, take))
                where.setdefault(epoch, []).append(np.arange(done, done + take))
                start, done = start + take, done + take
        ids, epochs = np.empty(done, dtype=np.uint64), np.empty(done, dtype=np.int64)
        for epoch in sorted(places):
            rows = np.concatenate(where[epoch])
            ids[rows] = self._ids(epoch, np.concatenate(places[epoch]))
            epochs[rows] = epoch
        return GlobalBatch(ids, epochs)

    def positions_of(self, number: int, first: int, last: int) -> list[tuple[int, int]]:
        """Returns the (position, lane) pairs of a sample in the lanes' endless streams, for positions in ``[first, last)``.

        Raises:
            DataError: there is no such sample.
        """
        shard, row = number >> 32, number & 0xFFFFFFFF
        if shard >= len(self._counts) or row >= self._counts[shard]:
            raise DataError(f"there is no sample {number}", where="order", hint="Use numbers of this manifest.")
        found = []
        for epoch in range(first // self._span, -(-last // self._span)):
            shards, ends, shift = lru_get(self._epochs, epoch, 3, self._epoch)
            slot = int(np.flatnonzero(shards == shard)[0])
            lane, place = divmod((int(ends[slot] - self._counts[shard]) + row - shift) % self._total, self._span)
            if lane >= self.lanes:
                continue  # part of this epoch's remainder
            block, index = divmod(place, self.block)
            within = int(np.flatnonzero(self._shuffled(epoch, lane, block) == index)[0])
            position = epoch * self._span + block * self.block + within
            if first <= position < last:
                found.append((position, lane))
        return found

    def uses(self, first: int, last: int, lanes: range) -> Iterator[tuple[int, int]]:
        """Yields shards with the position at which their block begins, for positions ``[first, last)`` of some lanes.

        Pairs of position (not below ``first``) and shard, by position; a shard occurs once for each block and lane.
        """
        while first < last:
            epoch, position = divmod(first, self._span)
            number = position // self.block
            size = min(self.block, self._span - number * self.block)
            shards, ends, shift = lru_get(self._epochs, epoch, 3, self._epoch)
            for lane in lanes:
                begin = (lane * self._span + number * self.block + shift) % self._total
                for low, high in ((begin, min(begin + size, self._total)), (0, begin + size - self._total)):
                    if low < high:
                        slots = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high - 1, side="right") + 1)
                        yield from ((first, int(shard)) for shard in shards[slots] if self._counts[shard])
            first = epoch * self._span + number * self.block + size

    def _of_lanes(self, step: int, first: int, last: int) -> GlobalBatch:
        if step < 0:
            raise ConfigError(f"step {step} is negative", where="step", hint="Steps count from 0.")
        ids = np.empty((last - first, self._each), dtype=np.uint64)
        epochs = np.empty(self._each, dtype=np.int64)
        done, start = 0, step * self._each
        while done < self._each:
            epoch, position = divmod(start + done, self._span)
            take = min(self._each - done, self._span - position)
            places = np.stack([self._places(epoch, lane, position, take) for lane in range(first, last)])
            ids[:, done : done + take] = self._ids(epoch, places)
            epochs[done : done + take] = epoch
            done += take
        return GlobalBatch(ids.reshape(-1), np.tile(epochs, last - first))

    def _places(self, epoch: int, lane: int, position: int, take: int) -> NDArray[np.int64]:
        """Returns the slots in the lane of its samples ``position`` to ``position + take``, before the shift."""
        parts = []
        while take > 0:
            number, index = divmod(position, self.block)
            shuffled = self._shuffled(epoch, lane, number)[index : index + take]
            parts.append(shuffled.astype(np.int64) + (lane * self._span + number * self.block))
            position, take = position + len(shuffled), take - len(shuffled)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _ids(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.uint64]:
        shards, ends, shift = lru_get(self._epochs, epoch, 3, self._epoch)
        places = (places + shift) % self._total
        slot = np.searchsorted(ends, places, side="right")
        shard = shards[slot]
        row = places - (ends[slot] - self._counts[shard])
        return (shard.astype(np.uint64) << np.uint64(32)) | row.astype(np.uint64)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        shards = permutation(len(self._counts), self.seed, epoch, _SHARDS)
        low, high = mix(self.seed, epoch, _SHIFT)
        return shards, np.cumsum(self._counts[shards]), (high << 32 | low) % self._total

    def _shuffled(self, epoch: int, lane: int, number: int) -> NDArray[Any]:
        def draw(key: tuple[int, int, int]) -> NDArray[Any]:
            size = min(self.block, self._span - number * self.block)
            return permutation(size, self.seed, *key, _BLOCK).astype(np.min_scalar_type(size))

        return lru_get(self._blocks, (epoch, lane, number), 2 * self.lanes + 2, draw)


def num_streams(global_batch: int, lanes: int | None, block: int) -> int:
    """Returns the number of lanes: as requested, or the greatest common divisor of the global batch and 256.

    Raises:
        ConfigError: it does not divide the global batch, or a size is not positive.
    """
    if global_batch < 1 or block < 1:
        raise ConfigError(
            f"global batch {global_batch} and block {block} must be positive",
            where="data",
            hint="Give whole numbers from 1 on.",
        )
    lanes = math.gcd(global_batch, _DEFAULT_LANES) if lanes is None else lanes
    if lanes < 1 or global_batch % lanes:
        raise ConfigError(
            f"{lanes} lanes do not divide the global batch of {global_batch}",
            where="data.canonical_streams",
            hint=f"Choose of {_listed(divisors(global_batch))}.",
        )
    return lanes


def rank_slice(lanes: int, world: int, rank: int) -> range:
    """Returns the lanes of a rank.

    Raises:
        ConfigError: an invalid world size, or no such rank.
    """
    if world < 1 or lanes % world:
        raise ConfigError(
            f"{world} ranks cannot share {lanes} lanes evenly",
            where="data.canonical_streams",
            hint=f"Use {_listed(divisors(lanes))} ranks, or a global batch with a suitable divisor.",
        )
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} does not exist among {world}", where="rank", hint=f"Ranks count from 0 to {world - 1}.")
    share = lanes // world
    return range(rank * share, (rank + 1) * share)


def divisors(n: int) -> list[int]:
    """Returns all divisors of a positive integer, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def in_order(uses: Iterable[tuple[float, int]]) -> list[int]:
    """Returns the shards of (time, shard) pairs sorted by time, each once."""
    return list(dict.fromkeys(shard for _, shard in uses))


def lru_get(cache: OrderedDict[_Key, _Value], key: _Key, limit: int, make: Callable[[_Key], _Value]) -> _Value:
    """Returns ``make(key)`` from a cache of the last ``limit`` results."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    value = cache[key] = make(key)
    while len(cache) > limit:
        cache.popitem(last=False)
    return value


def _listed(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers] if len(numbers) <= 16 else [*map(str, numbers[:12]), "…", *map(str, numbers[-3:])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
