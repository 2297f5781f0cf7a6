"""Global sample order: a pure function of the step number.

A fixed number of *streams* (setting ``data.canonical_streams``) partition each data set; every global batch takes the same number
of samples from each stream, stream by stream. A rank takes a contiguous part of every batch, which is one or several streams, or
part of one: the world size determines which rank reads a sample, never when it occurs. Nothing here has state: resuming means
asking for another step.

Several data sets are interleaved in fixed proportions (:mod:`pipeline.data.order.interleave`). Each has its own epochs: the epoch
of a sample counts the passes over *its* data set, and in one pass each sample occurs once (except for a remainder smaller than
the number of streams). A single data set is a mixture of one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index.selected import UNIT
from pipeline.data.order.dataset import ShuffledDataset
from pipeline.data.order.interleave import Interleaver
from pipeline.data.order.random import mix
from pipeline.data.order.weighted import SampleWeights, WeightedDataset
from pipeline.errors import ConfigError, DataError

_SET = 0x5E7  # stream constant that gives each data set its own seed
_DEFAULT_STREAMS = 256
BLOCK_SIZE = 16384


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step, or one rank's part of them, in order.

    Attributes:
        ids: uint64 ``[n]``, ``shard << 32 | row``.
        epochs: int64 ``[n]``, the epoch each sample belongs to.
    """

    ids: NDArray[np.uint64]
    epochs: NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """One data set of a mixture: a contiguous range of shards of the manifest.

    Attributes:
        name: name of the data set.
        first: index of its first shard.
        shards: number of its shards.
        weight: its fraction of the samples, relative to the others'; None: proportional to ``repeat`` times its size.
        repeat: how often each of its samples occurs during one epoch of a data set with repeat 1.
    """

    name: str
    first: int
    shards: int
    weight: float | None = None
    repeat: float = 1.0


class Order:
    """An endless, seekable stream of global batches over one or more data sets.

    An epoch, the unit of durations and schedules, is: of a single data set, one pass over it; with repeats, as many samples as it
    takes for every data set to be seen ``repeat`` times; with weights, as many samples as all data sets have together.

    Args:
        counts: accepted samples of each shard, over all data sets.
        seed: seed of the order.
        global_batch: samples per step, over all ranks.
        streams: number of streams; must divide the global batch. None: the greatest common divisor of the global batch and 256.
        block_size: samples of one data set that are shuffled together inside a stream.
        sources: the data sets, in the order of their shards, without gaps; either all have a weight or none has. Empty: the
            shards are a single data set.
        weights: how often the samples of some data sets occur in an epoch, by the number of the data set; others once.

    Raises:
        ConfigError: sizes that do not divide, or invalid weights.
        DataError: too few samples; the message names the data set.
    """

    def __init__(
        self,
        counts: Sequence[int] | NDArray[np.int64],
        seed: int,
        global_batch: int,
        streams: int | None = None,
        block_size: int = BLOCK_SIZE,
        sources: Sequence[Source] = (),
        weights: Mapping[int, SampleWeights] | None = None,
    ) -> None:
        self.seed, self.global_batch, self.block_size = seed, global_batch, block_size
        self.streams = num_streams(global_batch, streams, block_size)
        self.sources = tuple(sources) or (Source("data", 0, len(counts)),)
        if sources:
            _check(self.sources, len(counts))
        chosen = weights or {}
        self.datasets = tuple(self._dataset(number, counts, chosen.get(number)) for number in range(len(self.sources)))
        self._each = global_batch // self.streams
        spans = [dataset.span for dataset in self.datasets]
        weighted = any(source.weight is not None for source in self.sources)
        if len(self.sources) == 1:
            frequencies, self._span = [1], spans[0]
        else:
            shares = [
                Fraction(str(source.weight)) if source.weight is not None else Fraction(str(source.repeat)) * span
                for source, span in zip(self.sources, spans, strict=True)
            ]
            common = math.lcm(*(share.denominator for share in shares))
            frequencies = [int(share * common) for share in shares]
            self._span = sum(spans) if weighted else max(1, round(sum(shares)))
        self._interleaver = Interleaver(frequencies, self.streams, seed)

    def _dataset(self, number: int, counts: Sequence[int] | NDArray[np.int64], weights: SampleWeights | None) -> ShuffledDataset:
        source, seed = self.sources[number], self.seed
        own = np.asarray(counts[source.first : source.first + source.shards], dtype=np.int64)
        total = int(own.sum()) if weights is None else int(weights.totals.sum()) // UNIT
        if len(self.sources) == 1:
            if total < self.global_batch:
                raise DataError(
                    f"{total} usable samples{' (the sum of their weights)' if weights is not None else ''} are fewer than one "
                    f"global batch of {self.global_batch}",
                    where="data",
                    hint="Add shards or lower train.global_batch_size",
                )
        else:
            if total < self.streams:
                raise DataError(
                    f"data set {source.name!r} has {total} usable samples, fewer than the {self.streams} streams that share it",
                    where="data.sources",
                    hint="Set data.canonical_streams to fewer (a divisor of the global batch), add shards, or leave the set out",
                )
            low, high = mix(seed, number, _SET)
            seed = high << 32 | low
        if weights is not None:
            return WeightedDataset(own, seed, self.streams, self.block_size, weights)
        return ShuffledDataset(own, seed, self.streams, self.block_size)

    @property
    def total(self) -> int:
        """Number of samples in one pass over each data set."""
        return sum(dataset.total for dataset in self.datasets)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch, see the class; of a single data set all but a remainder smaller than the number of streams."""
        return self._span * self.streams

    @property
    def steps_per_epoch(self) -> int:
        """Complete steps in one epoch; epochs follow each other without a gap, so a step may span two."""
        return self._span // self._each

    @property
    def fractions(self) -> tuple[float, ...]:
        """Fraction of the samples from each data set; they sum to 1."""
        return self._interleaver.fractions

    def epoch_of(self, step: int) -> int:
        """Returns the epoch of the first sample of a step; in a mixture a sample's own epoch is in the batch."""
        return step * self._each // self._span

    def first_step(self, epoch: int) -> int:
        """Returns the first step that begins in an epoch or after it."""
        return -(-epoch * self._span // self._each)

    def next_epoch(self, step: int) -> int:
        """Returns the first step that begins in a later epoch than this one begins in."""
        return self.first_step(self.epoch_of(step) + 1)

    def check_world(self, world: int) -> None:
        """Rejects a world size that does not divide the global batch.

        Raises:
            ConfigError: the message lists the valid ones.
        """
        rank_slice(self.global_batch, world, 0)

    def streams_of(self, world: int, rank: int) -> range:
        """Returns the streams that a rank reads; ranks may share one.

        Raises:
            ConfigError: an invalid world size, or no such rank.
        """
        rows = rank_slice(self.global_batch, world, rank)
        return range(rows.start // self._each, -(-rows.stop // self._each))

    def batch(self, step: int) -> GlobalBatch:
        """Returns the global batch of a step, stream by stream: ``[global_batch]``."""
        return self._batch(step, range(self.global_batch))

    def rank_batch(self, step: int, world: int, rank: int) -> GlobalBatch:
        """Returns one rank's contiguous part of :meth:`batch`: ``[global_batch / world]``.

        Raises:
            ConfigError: an invalid world size, or no such rank.
        """
        return self._batch(step, rank_slice(self.global_batch, world, rank))

    def steps_of(self, number: int, first: int, last: int) -> list[int]:
        """Returns the steps in ``[first, last)`` that contain a sample, without drawing any of them.

        Args:
            number: the sample, ``shard << 32 | row``.
            first: the first step.
            last: one past the last.

        Raises:
            DataError: there is no such sample.
        """
        shard, begin, end = number >> 32, first * self._each, last * self._each
        which = next((d for d, s in enumerate(self.sources) if s.first <= shard < s.first + s.shards), None)
        if which is None:
            raise DataError(f"there is no sample {number}", where="order", hint="Use numbers of this manifest")
        own = number - (self.sources[which].first << 32)
        positions = self.datasets[which].positions_of(own, *self._interleaver.bounds(which, begin, end))
        slots = (self._interleaver.slot_of(which, stream, position) for position, stream in positions)
        return sorted(slot // self._each for slot in slots if begin <= slot < end)

    def shards(self, first: int, last: int, streams: range | None = None) -> list[int]:
        """Returns the shards that steps in ``[first, last)`` read, in the order of first use (of a mixture approximately).

        Derived from the blocks that the steps touch, without drawing samples. Shards may be listed that only other steps of the
        same block read, but none is missing.

        Args:
            first: the first step.
            last: one past the last.
            streams: restrict to these streams, such as a rank's or a node's; None: all.
        """
        streams = range(self.streams) if streams is None else streams

        def uses(which: int) -> Iterator[tuple[float, int]]:
            slots_each, start = 1 / self.fractions[which], self.sources[which].first
            bounds = self._interleaver.bounds(which, first * self._each, last * self._each)
            for position, shard in self.datasets[which].uses(*bounds, streams):
                yield position * slots_each, start + shard

        return _first_uses(heapq.merge(*(uses(which) for which in range(len(self.sources))))) if first < last else []

    def _batch(self, step: int, rows: range) -> GlobalBatch:
        """Returns some consecutive samples of the global batch of a step."""
        if step < 0:
            raise ConfigError(f"step {step} is negative", where="step", hint="Use 0 for the first step")
        start, each = step * self._each, self._each
        streams = range(rows.start // each, -(-rows.stop // each))
        if len(self.datasets) == 1:
            firsts = [max(rows.start - stream * each, 0) for stream in streams]
            lasts = [min(rows.stop - stream * each, each) for stream in streams]
            counts = [last - first for first, last in zip(firsts, lasts, strict=True)]
            return GlobalBatch(*self.datasets[0].samples(streams, [start + first for first in firsts], counts))
        own = slice(rows.start - streams.start * each, rows.stop - streams.start * each)
        labels, positions = self._interleaver.slots(streams, start, each)
        included = np.zeros(labels.size, dtype=bool)
        included[own] = True
        ids, epochs = np.empty(labels.shape, dtype=np.uint64), np.empty(labels.shape, dtype=np.int64)
        for which, dataset in enumerate(self.datasets):
            mask = (labels == which) & included.reshape(labels.shape)
            counts_of = mask.sum(axis=1)
            mixed = np.flatnonzero(counts_of)
            if not len(mixed):
                continue
            starts = positions[mixed, mask[mixed].argmax(axis=1)]  # the positions of a data set in a stream are consecutive
            numbers, passes = dataset.samples([streams[row] for row in mixed], starts.tolist(), counts_of[mixed].tolist())
            ids[mask] = numbers + (np.uint64(self.sources[which].first) << np.uint64(32))
            epochs[mask] = passes
        return GlobalBatch(ids.reshape(-1)[own], epochs.reshape(-1)[own])


def num_streams(global_batch: int, streams: int | None, block_size: int) -> int:
    """Returns the number of streams: as requested, or the greatest common divisor of the global batch and 256.

    Raises:
        ConfigError: it does not divide the global batch, or a size is not positive.
    """
    if global_batch < 1 or block_size < 1:
        raise ConfigError(
            f"global batch {global_batch} and block size {block_size} must be positive",
            where="data",
            hint="Give whole numbers from 1 on",
        )
    streams = math.gcd(global_batch, _DEFAULT_STREAMS) if streams is None else streams
    if streams < 1 or global_batch % streams:
        raise ConfigError(
            f"{streams} streams do not divide the global batch of {global_batch}",
            where="data.canonical_streams",
            hint=f"Choose one of {_listed(divisors(global_batch))}",
        )
    return streams


def rank_slice(global_batch: int, world: int, rank: int) -> range:
    """Returns the samples of a global batch that a rank takes, by their positions in it.

    Raises:
        ConfigError: an invalid world size, or no such rank.
    """
    if world < 1 or global_batch % world:
        raise ConfigError(
            f"{world} ranks cannot share a global batch of {global_batch} evenly",
            where="train.global_batch_size",
            hint=f"Use {_listed(divisors(global_batch))} ranks, or another global batch",
        )
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} does not exist among {world}", where="rank", hint=f"Use a rank from 0 to {world - 1}")
    share = global_batch // world
    return range(rank * share, (rank + 1) * share)


def divisors(n: int) -> list[int]:
    """Returns all divisors of a positive integer, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _first_uses(uses: Iterable[tuple[float, int]]) -> list[int]:
    """Returns the shards of (time, shard) pairs sorted by time, each once."""
    return list(dict.fromkeys(shard for _, shard in uses))


def _listed(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers] if len(numbers) <= 16 else [*map(str, numbers[:12]), "…", *map(str, numbers[-3:])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _check(sources: tuple[Source, ...], shards: int) -> None:
    """Rejects sources that do not cover the shards, share a name, or mix weights with repeats."""
    where = "data.sources"
    end = 0
    for source in sources:
        if source.first != end or source.shards < 1:
            raise ConfigError(f"shards of {source.name!r} do not follow those before", where=where, hint="Leave no gap")
        end += source.shards
        if not 0 < (source.repeat if source.weight is None else source.weight) < math.inf:
            raise ConfigError(f"weight or repeat of {source.name!r} is not positive", where=where, hint="Leave the set out")
    if end != shards:
        raise ConfigError(f"data sets have {end} shards, the manifest {shards}", where=where, hint="Name every shard once")
    if len({source.name for source in sources}) < len(sources):
        raise ConfigError("two data sets have one name", where=where, hint="Give each a name of its own")
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError("some data sets have a weight, others not", where=where, hint="Give all a weight, or none")
