"""What the data of a run cost, as estimated, against what the order, the prefetcher and the index really need."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import storage
from pipeline.data.index.build import build
from pipeline.data.index.fields import Fields
from pipeline.data.index.sidecar import COLUMNS
from pipeline.data.order.order import Order, Source, rank_slice
from pipeline.data.pack import synthetic
from pipeline.errors import ConfigError
from pipeline.estimate.data import Part, Reading, of_manifest, surveyed

WITHIN = 0.2
SIZE = 80_000  # bytes of a sample


def streams_of(order: Order, nodes: int, node: int) -> range:
    each, rows = order.global_batch // order.streams, rank_slice(order.global_batch, nodes, node)
    return range(rows.start // each, -(-rows.stop // each))


def measured(order: Order, first: int, last: int, nodes: int) -> float:
    """Shards of the busiest node."""
    return max(len(order.shards(first, last, streams_of(order, nodes, node))) for node in range(nodes))


@pytest.mark.parametrize(
    ("shards", "rows", "batch", "streams", "block", "nodes"),
    [
        (50_000, 10_000, 4096, 256, 16384, 1),
        (50_000, 10_000, 4096, 256, 16384, 8),
        (50_000, 10_000, 4096, 32, 16384, 1),
        (50_000, 10_000, 4096, 8, 8192, 1),
        (50_000, 10_000, 4096, 8, 16384, 64),
        (50_000, 1000, 1024, 128, 4096, 4),
        (1281, 1000, 1024, 256, 16384, 2),
        (200, 1000, 256, 256, 1000, 1),
        (40, 500, 96, 96, 16384, 3),
    ],
)
def test_shards_and_bytes_are_those_of_the_order(
    shards: int, rows: int, batch: int, streams: int, block: int, nodes: int
) -> None:
    generator = random.Random(0)
    counts = np.array([generator.randint(rows * 3 // 4, rows * 5 // 4) for _ in range(shards)])
    total = int(counts.sum())
    order = Order(counts, 1, batch, streams, block)
    reading = Reading((Part(total, shards, total * SIZE),), batch, streams, block, nodes)
    assert reading.steps_per_epoch == pytest.approx(order.steps_per_epoch, abs=1)
    assert [reading.node_streams(node) for node in range(nodes)] == [len(streams_of(order, nodes, n)) for n in range(nodes)]
    assert reading.shards(0, 1) == pytest.approx(measured(order, 0, 1, nodes), rel=WITHIN, abs=1)
    for first in (0, order.steps_per_epoch // 3):
        last = min(first + 1000, order.steps_per_epoch)
        down = sum(
            float((counts[order.shards(first, last, streams_of(order, nodes, node))] * SIZE).sum()) for node in range(nodes)
        )
        used = (last - first) * batch * SIZE
        assert reading.amplification(first, last) == pytest.approx(down / used, rel=WITHIN)
    horizon = max(2 * block * streams // batch, 1)
    needed = max(measured(order, first, min(first + horizon, order.steps_per_epoch), nodes) for first in (0, horizon // 4))
    assert reading.cache / SIZE / rows == pytest.approx(needed, rel=WITHIN, abs=1)


def test_nodes_share_a_batch_that_they_do_not_divide() -> None:
    part = Part(10_000, 10, 10_000 * SIZE)
    streams = [Reading((part,), 96, 96, 64, 7).node_streams(node) for node in range(7)]
    assert sum(streams) == 96 and set(streams) == {13, 14}
    many = Reading((part,), 4, 4, 64, 8)
    assert [many.node_streams(node) for node in range(8)] == [0, 1] * 4 and many.shards(0, 1, 0) == 0


@pytest.mark.parametrize("samples", [(0,), (95,), (0, 500), (500, 30)])
def test_sets_that_give_no_batch_are_refused(samples: tuple[int, ...]) -> None:
    parts = tuple(Part(count, 2, 1000, 1 / len(samples)) for count in samples)
    with pytest.raises(ConfigError, match="has fewer than") as refused:
        Reading(parts, 96, 32, 64)
    assert refused.value.hint


def test_a_mixture_needs_what_its_sets_need() -> None:
    counts = np.full(3000, 1000)
    sources = (Source("large", 0, 2600, 0.7), Source("small", 2600, 400, 0.3))
    order = Order(counts, 0, 1024, 64, 4096, sources)
    parts = (Part(2_600_000, 2600, 2_600_000 * SIZE, 0.7), Part(400_000, 400, 400_000 * SIZE, 0.3))
    reading = Reading(parts, 1024, 64, 4096)
    assert reading.shards(0, 1) == pytest.approx(len(order.shards(0, 1)), rel=WITHIN)
    assert reading.shards(0, 1000) == pytest.approx(len(order.shards(0, 1000)), rel=WITHIN)


def test_few_enough_streams_are_proposed() -> None:
    reading = Reading((Part(5 * 10**9, 500_000, 5 * 10**9 * SIZE),), 4096, 256, 16384)
    streams = reading.fewer_streams(2 * 8)
    assert streams == 4
    order = Order(np.full(500_000, 10_000), 0, 4096, streams)
    assert len(order.shards(0, 1)) <= 16 < len(Order(np.full(500_000, 10_000), 0, 4096).shards(0, 1))
    assert reading.fewer_streams(0) is None


def test_an_index_is_what_was_estimated_from_a_few_shards(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "data", train=1200, val=10, size=32, seed=1, samples_per_shard=100)
    store, fields = storage.Storage(), Fields()
    abouts = [store.stat(url) for url in storage.expand(f"{tmp_path}/data/*train-*.tar")]
    part, cost = surveyed(abouts, fields, store, 3)
    manifest = build([about.url for about in abouts], tmp_path / "index", workers=1)
    assert part.samples == pytest.approx(manifest.total, rel=WITHIN)
    assert (part.shards, part.size, cost.read) == (12, manifest.shards.sizes.sum(), sum(about.size for about in abouts))
    there = of_manifest(manifest)
    rows = manifest.rows(0)
    held = sum(rows.columns[name].nbytes for name in COLUMNS) + rows.keys.nbytes
    for one in (cost, there):
        assert one.rows(100) == pytest.approx(held, rel=WITHIN)
    assert one.read == cost.read and there.cpu is None and there.seconds(4) is None
    assert cost.cpu is not None and cost.seconds(2, 3) == cost.cpu / 6 > 0
    assert cost.rows(10**9) == 256 << 20, "more is not kept"
    (tmp_path / "many").mkdir()
    for number in range(150):
        shutil.copyfile(abouts[number % 12].url, tmp_path / "many" / f"scenes-train-{number:05d}.tar")
    many = [store.stat(url) for url in storage.expand(f"{tmp_path}/many/*.tar")]
    whole = of_manifest(build([about.url for about in many], tmp_path / "of-many", workers=1))
    assert surveyed(many, fields, store, 3)[1].mapped == pytest.approx(whole.mapped, rel=WITHIN)


def test_shards_without_samples_tell_nothing(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "data", train=20, val=10, size=16, seed=1, samples_per_shard=10)
    store = storage.Storage()
    abouts = [store.stat(url) for url in storage.expand(f"{tmp_path}/data/*train-*.tar")]
    with pytest.raises(ConfigError, match="2 shards have no usable sample"):
        surveyed(abouts, Fields(images=("bmp",)), store, 2)
