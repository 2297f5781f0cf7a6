"""Downloads and shuffling against the number of streams of an order, and what ``fovea estimate`` says of both.

A set of equal shards is never read: its order is drawn, which is exact. Mixing is measured on the worst case, shards that are
sorted by class, and by how far apart neighbours in a batch lie in storage.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data import storage
from pipeline.data.index.build import build
from pipeline.data.index.fields import Fields
from pipeline.data.order.default_streams import Extent, default_streams
from pipeline.data.order.order import Order
from pipeline.data.pack import synthetic
from pipeline.estimate.data import Part, Reading, of_manifest, surveyed

_CLASSES = 1000
_STEPS = 1000
_BATCHES = 20  # over which mixing is averaged
_SAMPLE_BYTES = 80_000
_RANKS_OF_A_NODE = 8
_EPOCHS = 16  # over which the first step is averaged


@dataclass(frozen=True)
class Shape:
    """A set and its order.

    Attributes:
        shards: number of shards.
        rows: samples of each.
        batch: global batch size.
        block: samples that are shuffled together in a stream.
    """

    shards: int = 500_000
    rows: int = 10_000
    batch: int = 4096
    block: int = 16384


@dataclass(frozen=True)
class Mixing:
    """Downloads and mixing with some number of streams, on one node.

    Attributes:
        streams: number of streams.
        first: shards that the first step needs.
        cache: shards that the block in use and the two ahead hold.
        amplification: bytes downloaded for each byte used, in 1000 steps that begin after a third of an epoch.
        shards: shards in a batch.
        distance: mean distance of two samples that follow each other in a batch, in storage order, relative to that of two random
            samples of the set.
        same: fraction of pairs of a batch that are from one shard.
        classes: classes in a batch, of 1000, if the set is stored by class.
    """

    streams: int
    first: int
    cache: int
    amplification: float
    shards: float
    distance: float
    same: float
    classes: float


@dataclass(frozen=True)
class Default:
    """What a new run of some ranks, eight on each node, has by default.

    Attributes:
        ranks: number of ranks.
        streams: number of streams.
        first: shards that the first step needs on the first node, the most of 16 epochs.
        amplification: bytes that all nodes download for each byte used, in the first 1000 steps.
    """

    ranks: int
    streams: int
    first: int
    amplification: float


@dataclass(frozen=True)
class Compared:
    """A figure as estimated and as measured."""

    name: str
    unit: str
    estimated: float
    measured: float


def mixing(shape: Shape, streams: Sequence[int]) -> list[Mixing]:
    """Downloads and mixing for several numbers of streams."""
    return [_mixing(shape, Order(np.full(shape.shards, shape.rows), 0, shape.batch, n, shape.block)) for n in streams]


def _mixing(shape: Shape, order: Order) -> Mixing:
    total, begin = shape.shards * shape.rows, order.steps_per_epoch // 3
    steps = min(_STEPS, order.steps_per_epoch - begin)
    generator = np.random.default_rng(0)
    rows = []
    for step in generator.integers(0, order.steps_per_epoch, _BATCHES).tolist():
        ids = order.batch(step).ids
        shards, row = (ids >> np.uint64(32)).astype(np.int64), (ids & np.uint64(0xFFFFFFFF)).astype(np.int64)
        places = shards * shape.rows + row
        counts = np.unique(shards, return_counts=True)[1]
        same = float((counts * (counts - 1)).sum() / (len(ids) * (len(ids) - 1)))
        classes = len(np.unique(places * _CLASSES // total))
        rows.append((len(counts), np.abs(np.diff(places)).mean() / (total / 3), same, classes))
    shards_of, distance, same, classes_of = np.mean(rows, axis=0).tolist()
    down = len(order.shards(begin, begin + steps)) * shape.rows / (steps * shape.batch)
    return Mixing(order.streams, len(order.shards(0, 1)), _cached(order, begin), down, shards_of, distance, same, classes_of)


def _cached(order: Order, begin: int) -> int:
    ahead = max(2 * order.block_size * order.streams // order.global_batch, 1)
    return len(order.shards(begin, min(begin + ahead, order.steps_per_epoch)))


def defaults(shape: Shape, ranks: Sequence[int]) -> list[Default]:
    """Downloads with the number of streams that a new run has by default."""
    extent = Extent(shape.shards * shape.rows, shape.shards, shape.shards * shape.rows * _SAMPLE_BYTES)
    rows = []
    for number in ranks:
        streams, nodes = default_streams(shape.batch, [extent], shape.block), max(number // _RANKS_OF_A_NODE, 1)
        order = Order(np.full(shape.shards, shape.rows), 0, shape.batch, streams, shape.block)
        firsts = [order.first_step(epoch) for epoch in range(_EPOCHS)]
        first = max(len(order.shards(one, one + 1, _of(order, nodes, 0))) for one in firsts)
        steps = min(_STEPS, order.steps_per_epoch)
        down = sum(len(order.shards(0, steps, _of(order, nodes, node))) for node in range(nodes))
        rows.append(Default(number, order.streams, first, down * shape.rows / (steps * shape.batch)))
    return rows


def compared(shape: Shape, streams: Sequence[int], nodes: int, scenes: int) -> list[Compared]:
    """Estimates and measurements: of orders, and of an index of synthetic scenes.

    Args:
        shape: the set and its order.
        streams: numbers of streams.
        nodes: nodes that share the streams; the first one is measured.
        scenes: images of the set that is indexed.
    """
    part = Part(shape.shards * shape.rows, shape.shards, shape.shards * shape.rows * _SAMPLE_BYTES)
    shard = shape.rows * _SAMPLE_BYTES / 1e9
    rows = []
    for number in streams:
        order = Order(np.full(shape.shards, shape.rows), 0, shape.batch, number, shape.block)
        reading, begin = Reading((part,), shape.batch, number, shape.block, nodes), order.steps_per_epoch // 3
        steps = min(_STEPS, order.steps_per_epoch - begin)
        used, where = steps * shape.batch / shape.rows, f"{number} streams, {nodes} nodes"
        own, firsts = _of(order, nodes, 0), [order.first_step(epoch) for epoch in range(_EPOCHS)]
        down = sum(len(order.shards(begin, begin + steps, _of(order, nodes, node))) for node in range(nodes))
        ahead = max(2 * shape.block * number // shape.batch, 1)
        rows += [
            Compared(
                f"first step of a node, {where}, mean of {_EPOCHS} epochs",
                "GB",
                reading.bytes(0, 1) / 1e9,
                shard * float(np.mean([len(order.shards(first, first + 1, own)) for first in firsts])),
            ),
            Compared(
                f"cache of a node, {where}",
                "GB",
                reading.cache / 1e9,
                max(len(order.shards(first, first + ahead, own)) for first in (0, ahead // 4, ahead // 3)) * shard,
            ),
            Compared(
                f"bytes downloaded for each used, {steps} steps, {where}",
                "",
                reading.amplification(begin, begin + steps),
                down / used,
            ),
        ]
    return [*rows, *_indexed(scenes)]


def _of(order: Order, nodes: int, node: int) -> range:
    each = order.global_batch // nodes
    one = order.global_batch // order.streams
    return range(node * each // one, -(-(node + 1) * each // one))


def _indexed(scenes: int) -> list[Compared]:
    with tempfile.TemporaryDirectory(prefix="fovea-scale-") as folder:
        synthetic.write(f"{folder}/data", train=scenes, val=10, size=64, seed=0, samples_per_shard=max(scenes // 40, 1))
        store = storage.Storage()
        abouts = [store.stat(url) for url in storage.expand(f"{folder}/data/*train-*.tar")]
        part, cost = surveyed(abouts, Fields(), store, 3)
        begin = time.process_time()
        manifest = build([about.url for about in abouts], Path(folder) / "index", workers=1)
        cpu = time.process_time() - begin
        there, rows = of_manifest(manifest), manifest.rows(0)
        held = sum(column.nbytes for column in rows.columns.values()) + rows.keys.nbytes
        name = f"index of {len(abouts)} shards, from 3 of them"
        return [
            Compared(f"{name}: samples", "", part.samples, manifest.total),
            Compared(f"{name}: CPU time", "s", cost.cpu or 0.0, cpu),
            Compared(f"{name}: table of shards", "kB", cost.mapped / 1e3, there.mapped / 1e3),
            Compared(f"{name}: rows of a shard in memory", "kB", cost.rows(float(manifest.sizes[0])) / 1e3, held / 1e3),
        ]


def markdown(rows: Sequence[Mixing], estimates: Sequence[Compared], chosen: Sequence[Default], shape: Shape) -> list[str]:
    """Sections of a page."""
    lines = [
        "## Streams: downloads against shuffling",
        "",
        f"{shape.shards:,} shards of {shape.rows:,}, global batch {shape.batch:,}, blocks of {shape.block:,}, one node; "
        "`data.canonical_streams` of a new run. *Classes* and *same shard* matter for shards that are stored by class; packing "
        f"shuffles them. A random batch would have {_CLASSES * (1 - (1 - 1 / _CLASSES) ** shape.batch):.0f} classes.",
        "",
        "| streams | shards for the first step | of the cache | bytes downloaded for each used, 1000 steps | shards in a batch "
        "| distance of neighbours, random = 1 | pairs from the same shard | classes in a batch, of 1000, stored by class |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.streams} | {row.first} | {row.cache} | {row.amplification:.2f} | {row.shards:.0f} | {row.distance:.2f} | "
        f"{row.same:.2%} | {row.classes:.0f} |"
        for row in rows
    ]
    if chosen:
        lines += [
            "",
            f"By default a new run on this set ({shape.shards * shape.rows * _SAMPLE_BYTES / 1e12:,.0f} TB) has these, with "
            f"{_RANKS_OF_A_NODE} ranks on a node; nodes that share a stream download its shards each. A set whose first step "
            "needs at most 256 GiB has 256 streams:",
            "",
            "| ranks | streams | shards for the first step of a node | bytes downloaded for each used, 1000 steps |",
            "|---:|---:|---:|---:|",
        ]
        lines += [f"| {row.ranks} | {row.streams} | {row.first} | {row.amplification:.2f} |" for row in chosen]
    lines += [
        "",
        "## What fovea estimate says, and what it is",
        "",
        "| figure | estimated | measured | ratio |",
        "|---|---:|---:|---:|",
    ]
    for one in estimates:
        values = [f"{value:,.3g} {one.unit}".strip() for value in (one.estimated, one.measured)]
        lines.append(f"| {one.name} | {values[0]} | {values[1]} | {one.estimated / max(one.measured, 1e-9):.2f} |")
    return [*lines, ""]
