"""The number of streams of an order, where ``data.canonical_streams`` leaves it open.

Many streams mix shards that are stored by class or by source; each keeps the shards of a block of its own in use. The default is
high, unless the shards of the first step would be many gigabytes: then a run begins with few shards, and downloads little more
than it uses. It follows from the data and the batch alone, so that the batches are the same on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order.order import Source

_MOST, _LEAST = 256, 8
_SHARE = 512  # samples of a batch from one stream, if there are few streams
_FIRST_STEP = 256 << 30  # bytes of shards for the first step, above which there are few


@dataclass(frozen=True)
class Extent:
    """Size of one data set.

    Attributes:
        samples: usable samples.
        shards: number of shards.
        size: of all shards, bytes.
    """

    samples: int
    shards: int
    size: int


def default_streams(global_batch: int, extents: Sequence[Extent], block_size: int) -> int | None:
    """Returns the number of streams; ``None`` for the default of :class:`pipeline.data.order.order.Order`.

    Args:
        global_batch: samples per step.
        extents: the data sets.
        block_size: samples of one data set that are shuffled together in a stream.
    """
    first = math.gcd(max(global_batch, 1), _MOST)
    if _first_step(extents, first, block_size) <= _FIRST_STEP:
        return None
    few = max(_LEAST, global_batch // _SHARE)
    chosen = next(number for number in _divisors_from(few) if global_batch % number == 0)
    return chosen if chosen < first else None


def _divisors_from(least: int) -> Sequence[int]:
    """Candidates from a number on: powers of two, and at last 1, which always divides."""
    power = 1 << (least - 1).bit_length()
    return [*(power << shift for shift in range(10)), *(power >> shift for shift in range(1, power.bit_length()))]


def _first_step(extents: Sequence[Extent], streams: int, block_size: int) -> float:
    """Expected bytes of the shards that the first blocks of all streams touch."""
    total = 0.0
    for one in extents:
        samples, shards = max(one.samples, 1), max(one.shards, 1)
        block = min(block_size, max(one.samples // streams, 1))
        total += min(streams * (block * shards / samples + 1), shards) * one.size / shards
    return total


def extents_of(samples: NDArray[np.int64], sizes: NDArray[np.int64], sources: Sequence[Source]) -> list[Extent]:
    """The data sets of an index.

    Args:
        samples: usable samples of each shard, int64 ``[shards]``.
        sizes: bytes of each shard, int64 ``[shards]``.
        sources: the data sets; empty for a single one.
    """
    ranges = [(one.first, one.first + one.shards) for one in sources] or [(0, len(sizes))]
    return [Extent(int(samples[low:high].sum()), high - low, int(sizes[low:high].sum())) for low, high in ranges]
