"""Which sample comes when: a pure function of the step number.

A fixed number of *lanes* share the data set; every global batch takes the same number of samples from each lane. A rank owns
a run of neighbouring lanes, so the number of ranks decides who reads a sample, never when it comes. Nothing here has state:
resuming is asking for another step.

One epoch: the shards are shuffled and laid end to end, the start is shifted by a random amount, and the whole is cut into
lanes of equal length. Inside a lane blocks of samples are shuffled. What does not divide by the lanes (fewer samples than
lanes) is left out, others in each epoch because of the shift.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.random import mix, permutation
from pipeline.errors import ConfigError, DataError

_SHARDS, _SHIFT, _BLOCK = 0x5AAD, 0x5817, 0xB10C  # name the draws
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
        seed: another seed, another order.
        global_batch: samples a step, over all ranks.
        lanes: shares of the data set; must divide the global batch, and the world size must divide it. None: the greatest
            common divisor of the global batch and 256.
        block: samples that are shuffled together inside a lane.

    Raises:
        ConfigError: sizes that do not divide; the message lists those that would.
        DataError: fewer samples than one global batch.
    """

    def __init__(self, counts: Sequence[int], seed: int, global_batch: int, lanes: int | None = None, block: int = 16384) -> None:
        if global_batch < 1 or block < 1:
            raise ConfigError(
                f"global batch {global_batch} and block {block} must be positive",
                where="data",
                mend="Give whole numbers from 1 on.",
            )
        lanes = math.gcd(global_batch, _DEFAULT_LANES) if lanes is None else lanes
        if lanes < 1 or global_batch % lanes:
            raise ConfigError(
                f"{lanes} lanes do not divide the global batch of {global_batch}",
                where="data.lanes",
                mend=f"Choose of {_listed(divisors(global_batch))}.",
            )
        self._counts = np.asarray(counts, dtype=np.int64)
        self._total = int(self._counts.sum())
        if self._total < global_batch:
            raise DataError(
                f"{self._total} usable samples are fewer than one global batch of {global_batch}",
                where="data",
                mend="Add shards or make the global batch smaller.",
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
        """Samples to choose from."""
        return self._total

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch: all but the remainder, which is smaller than the number of lanes."""
        return self._span * self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one epoch; epochs follow each other without a gap, so a step may straddle two."""
        return self._span // self._each

    def epoch_of(self, step: int) -> int:
        """The epoch of the first sample of a step."""
        return step * self._each // self._span

    def check_world(self, world: int) -> None:
        """Refuses a number of ranks that does not divide the lanes.

        Raises:
            ConfigError: with the numbers that do.
        """
        if world < 1 or self.lanes % world:
            raise ConfigError(
                f"{world} ranks cannot share {self.lanes} lanes evenly",
                where="data.lanes",
                mend=f"Use {_listed(divisors(self.lanes))} ranks, or a global batch with a suitable divisor.",
            )

    def batch(self, step: int) -> GlobalBatch:
        """The whole global batch of a step, lane by lane: ``[global_batch]``."""
        return self._of_lanes(step, 0, self.lanes)

    def rank_batch(self, step: int, world: int, rank: int) -> GlobalBatch:
        """One rank's contiguous part of :meth:`batch`: ``[global_batch / world]``.

        Raises:
            ConfigError: an illegal number of ranks, or no such rank.
        """
        self.check_world(world)
        if not 0 <= rank < world:
            raise ConfigError(
                f"rank {rank} does not exist among {world}", where="rank", mend=f"Ranks count from 0 to {world - 1}."
            )
        share = self.lanes // world
        return self._of_lanes(step, rank * share, (rank + 1) * share)

    def shards(self, first: int, last: int, lanes: range) -> list[int]:
        """Numbers of the shards that some lanes read in steps ``first`` to ``last`` (not included), in order of first use.

        Whole blocks are looked at, no sample is drawn, so it costs microseconds a block.
        """
        found: dict[int, None] = {}
        start, stop = first * self._each, last * self._each
        while start < stop:
            epoch, position = divmod(start, self._span)
            number = position // self.block
            end = min((number + 1) * self.block, self._span)
            shards, ends, shift = _remember(self._epochs, epoch, 3, self._epoch)
            for lane in lanes:
                low = (lane * self._span + number * self.block + shift) % self._total
                high = low + end - number * self.block
                for begin, stop_at in ((low, min(high, self._total)), (0, high - self._total)):
                    if begin < stop_at:
                        slots = np.searchsorted(ends, [begin, stop_at - 1], side="right")
                        found.update((int(shard), None) for shard in shards[slots[0] : slots[1] + 1] if self._counts[shard])
            start += end - position
        return list(found)

    def _of_lanes(self, step: int, first: int, last: int) -> GlobalBatch:
        if step < 0:
            raise ConfigError(f"step {step} is negative", where="step", mend="Steps count from 0.")
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
        """Places in the lane of its samples ``position`` to ``position + take``, before the shift."""
        parts = []
        while take > 0:
            number, index = divmod(position, self.block)
            shuffled = self._shuffled(epoch, lane, number)[index : index + take]
            parts.append(shuffled.astype(np.int64) + (lane * self._span + number * self.block))
            position, take = position + len(shuffled), take - len(shuffled)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _ids(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.uint64]:
        shards, ends, shift = _remember(self._epochs, epoch, 3, self._epoch)
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

        return _remember(self._blocks, (epoch, lane, number), 2 * self.lanes + 2, draw)


def divisors(n: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _remember(cache: OrderedDict[_Key, _Value], key: _Key, limit: int, make: Callable[[_Key], _Value]) -> _Value:
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
