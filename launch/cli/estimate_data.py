"""What ``fovea estimate`` says of a run's data: downloads, cache, read amplification, and the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.terminal import Terminal
from pipeline.config.schema import Config
from pipeline.data import storage
from pipeline.data.indexing import Indexer, fields, open_storage
from pipeline.data.order.default_streams import Extent, default_streams, extents_of
from pipeline.data.order.order import Order, num_streams
from pipeline.errors import ConfigError, DataError
from pipeline.estimate.data import IndexCost, Part, Reading, cores, of_manifest, surveyed

_STEPS = 1000
_GOOD = 1.3  # bytes downloaded for each byte used, above which fewer streams are proposed


@dataclass(frozen=True)
class DataCost:
    """What the data of a run cost.

    Attributes:
        reading: the order and the nodes.
        index: cost of the index.
        indexed: whether the index is there already.
        ranks: ranks of each node.
        selected: whether selections leave out samples, which are counted as if they were used.
    """

    reading: Reading
    index: IndexCost
    indexed: bool
    ranks: int
    selected: bool = False


def data_cost(config: Config, *, ranks: int, nodes: int, shards: int, samples: int | None) -> DataCost | None:
    """Estimates from the index of the run's shards, or from their sizes or some shards that are indexed for it.

    Without an index, asks the storage for all shards, also a remote one, and reads the shards that are indexed.

    Args:
        config: the settings.
        ranks: number of ranks.
        nodes: number of nodes.
        shards: how many shards to index, if there is no index.
        samples: usable samples, if they are known.

    Returns:
        The cost; ``None``, and nothing was asked, if there is no index and neither ``shards`` nor ``samples`` is given.

    Raises:
        DataError, ConfigError: the shards cannot be found or indexed, or have fewer samples than a batch.
    """
    batch, block = config.train.global_batch_size, config.data.shuffle_block_size

    def streams_of(extents: Sequence[Extent]) -> int:
        return num_streams(batch, config.data.canonical_streams or default_streams(batch, extents, block), block)

    selected = bool(config.data.selection_files)
    existing = Indexer(config).existing()
    if existing is not None:
        manifest, sources = existing
        streams = streams_of(extents_of(manifest.sizes, manifest.shards.sizes, sources))
        fractions = Order(manifest.sizes, config.run.seed, batch, streams, block, sources).fractions if sources else (1.0,)
        ranges = [(source.first, source.first + source.shards) for source in sources] or [(0, len(manifest.shards))]
        parts = tuple(
            Part(int(manifest.sizes[low:high].sum()), high - low, int(manifest.shards.sizes[low:high].sum()), fraction)
            for (low, high), fraction in zip(ranges, fractions, strict=True)
        )
        reading = Reading(parts, batch, streams, block, nodes)
        return DataCost(reading, of_manifest(manifest), True, ranks // nodes, selected)
    if not shards and not samples:
        return None
    store = open_storage(config, at_start=True)
    answers = store.stats(storage.expand(list(config.data.patterns), store))
    abouts = [about for about in answers if not isinstance(about, DataError)]
    if not abouts:
        raise next(answer for answer in answers if isinstance(answer, DataError))
    if shards:
        part, index = surveyed(abouts, fields(config), store, shards)
    else:
        size = sum(about.size for about in abouts)
        part, index = Part(1, len(abouts), size), IndexCost(size, None, 0.0, 0.0)
    parts = (Part(samples, part.shards, part.size) if samples else part,)  # of a mixture, as if it were one data set
    streams = streams_of([Extent(int(one.samples), one.shards, one.size) for one in parts])
    return DataCost(Reading(parts, batch, streams, block, nodes), index, False, ranks // nodes, selected)


def data(
    config: Config, *, ranks: int, nodes: int, shards: int, samples: int | None, console: Terminal | None = None
) -> DataCost | None:
    """Print :func:`data_cost`; a line that says why without it."""
    out = console or Terminal()
    try:
        cost = data_cost(config, ranks=ranks, nodes=nodes, shards=shards, samples=samples)
        shown = lines(cost) if cost is not None else []
    except (DataError, ConfigError) as error:
        out.print(f"Data are not estimated: {error}", style="dim", markup=False)
        return None
    if cost is None:
        out.print("Data are not estimated: the shards are not indexed; --index-shards 3 indexes three of them.", style="dim")
        return None
    for line in shown:
        out.print(line, markup=False)
    return cost


def lines(cost: DataCost) -> list[str]:
    """The estimate as text."""
    reading, index = cost.reading, cost.index
    samples, shards = sum(part.samples for part in reading.parts), sum(part.shards for part in reading.parts)
    steps = min(_STEPS, reading.steps_per_epoch)
    out = [
        f"Data: {samples:,} samples in {shards:,} shards, {_size(index.read)}; {reading.streams} streams, blocks of "
        f"{reading.block_size:,}; {reading.nodes} node{'s' * (reading.nodes > 1)}.",
        f"Shards on object storage: a node needs {reading.shards(0, 1):,.0f} ({_size(reading.bytes(0, 1))}) for its first step, "
        f"{_size(reading.bytes(0, steps))} for {steps:,} steps, and {_size(reading.cache)} of cache (data.storage.cache_gb).",
        f"Bytes downloaded for each byte used: {_ratio(reading, 0, steps)} in the first {steps:,} steps, "
        f"{_ratio(reading, 0, reading.steps_per_epoch)} in an epoch.",
    ]
    if cost.selected:
        out.append("Selections are not counted: the figures are those of all samples, of which a run with them reads fewer.")
    most = 2 * cost.ranks
    fewer = reading.fewer_streams(most)
    heavy = reading.shards(0, 1) > most or reading.amplification(0, steps) > _GOOD
    if heavy and fewer is not None and fewer < reading.streams:
        new = Reading(reading.parts, reading.global_batch, fewer, reading.block_size, reading.nodes)
        out.append(
            f"data.canonical_streams={fewer} needs {new.shards(0, 1):,.0f} shards ({_size(new.bytes(0, 1))}) for the first step "
            f"and {_size(new.cache)} of cache, downloads {_ratio(new, 0, steps)} bytes for each used, and a batch has samples of "
            f"{new.shards(0, 1) * new.nodes:,.0f} shards: for shards that are shuffled already (fovea shards pack)."
        )
    if cost.indexed:
        out.append(f"Index: there already; {_size(index.mapped)} mapped by the processes of a node, {_rows(cost)}.")
    elif index.cpu is not None:
        here = cores()
        out.append(
            f"Index: reads {_size(index.read)} and takes {_time(index.cpu)} of CPU, {_time(index.seconds(here) or 0)} on {here} "
            f"cores such as these; fovea shards index --part i/n divides it among machines. Then {_size(index.mapped)} are "
            f"mapped by the processes of a node, {_rows(cost)}."
        )
    else:
        out.append(f"Index: reads {_size(index.read)}; --index-shards 3 indexes three shards to estimate its time and memory.")
    return out


def _rows(cost: DataCost) -> str:
    reading = cost.reading
    samples = sum(part.samples for part in reading.parts) / sum(part.shards for part in reading.parts)
    live = reading.shards(0, 1) / max(cost.ranks, 1)
    return f"and {_size(cost.index.rows(live * samples))} held by each data worker"


def _ratio(reading: Reading, first: int, last: int) -> str:
    return f"{reading.amplification(first, last):.2f}"


def _size(value: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
