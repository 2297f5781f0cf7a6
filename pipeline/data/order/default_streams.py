"""The number of streams of a new run, where ``data.canonical_streams`` leaves it open.

Many streams mix shards that are stored by class or by source; each of them keeps the shards of a block of its own in use. The
default number is high, unless the shards of the first step would be large: then a run begins with few shards of each rank, and
downloads little more than it uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.order import Source

_MOST, _LEAST = 256, 8
_FIRST_STEP = 16 << 30  # bytes of shards for the first step of all ranks, below which the number is not lowered
_OF_A_RANK = 2 << 30  # bytes of them for each rank, or two shards, if that is more


@dataclass(frozen=True)
class Extent:
    """Size of one data set of a run.

    Attributes:
        samples: usable samples.
        shards: number of shards.
        size: of all shards, bytes.
    """

    samples: int
    shards: int
    size: int


def default_streams(global_batch: int, world: int, extents: Sequence[Extent], block_size: int) -> int | None:
    """Returns the number of streams of a new run; ``None`` for the default of :class:`pipeline.data.order.order.Order`.

    Args:
        global_batch: samples per step.
        world: number of ranks.
        extents: the data sets.
        block_size: samples of one data set that are shuffled together in a stream.
    """
    divisible = world > 0 and global_batch % world == 0
    first = math.gcd(global_batch, _MOST)
    limit = max(_FIRST_STEP, world * max(_OF_A_RANK, *(2 * one.size / max(one.shards, 1) for one in extents)))
    chosen = 0
    for number in (first // 2**power for power in range(first.bit_length()) if first % 2**power == 0):
        shared = math.lcm(number, world) if divisible else number
        if chosen and shared < min(_LEAST, first):
            break
        chosen = shared
        if _first_step(extents, shared, block_size) <= limit:
            break
    return None if chosen == first else chosen


def _first_step(extents: Sequence[Extent], streams: int, block_size: int) -> float:
    """Expected bytes of the shards that the first blocks of all streams touch."""
    total = 0.0
    for one in extents:
        samples, shards = max(one.samples, 1), max(one.shards, 1)
        block = min(block_size, max(one.samples // streams, 1))
        total += min(streams * (block * shards / samples + 1), shards) * one.size / shards
    return total


def extents_of(samples: NDArray[np.int64], sizes: NDArray[np.int64], sources: Sequence[Source]) -> list[Extent]:
    """The data sets of a run.

    Args:
        samples: usable samples of each shard, int64 ``[shards]``.
        sizes: bytes of each shard, int64 ``[shards]``.
        sources: the data sets; empty for a single one.
    """
    ranges = [(one.first, one.first + one.shards) for one in sources] or [(0, len(sizes))]
    return [Extent(int(samples[low:high].sum()), high - low, int(sizes[low:high].sum())) for low, high in ranges]
