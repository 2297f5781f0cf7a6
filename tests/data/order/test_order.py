"""Order is a pure function: exactly once, the same on any number of ranks, and seekable."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order.order import Order, divisors
from pipeline.errors import ConfigError, DataError
from tests.helpers.limits import cpu_limit


@st.composite
def orders(draw: st.DrawFn) -> Order:
    streams = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    batch = streams * draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda c: sum(c) >= batch))
    return Order(counts, draw(st.integers(0, 1 << 40)), batch, streams, draw(st.integers(1, 50)))


def valid_ids(order: Order) -> set[int]:
    return {shard << 32 | row for shard, count in enumerate(order.datasets[0].counts.tolist()) for row in range(count)}


@settings(max_examples=50, deadline=None)
@given(order=orders(), first=st.integers(0, 3))
def test_every_epoch_takes_each_sample_once_but_for_a_remainder_below_the_streams(order: Order, first: int) -> None:
    start = -(-first * order.samples_per_epoch // order.global_batch)
    taken: dict[int, list[int]] = {}
    for step in range(start, start + 2 * order.steps_per_epoch + 3):
        batch = order.batch(step)
        for number, epoch in zip(batch.ids.tolist(), batch.epochs.tolist(), strict=True):
            taken.setdefault(epoch, []).append(number)
    whole = [epoch for epoch, ids in taken.items() if len(ids) == order.samples_per_epoch]
    assert whole
    for ids in taken.values():
        assert len(set(ids)) == len(ids)
        assert set(ids) <= valid_ids(order)
    assert order.total - order.samples_per_epoch < order.streams


@settings(max_examples=25, deadline=None)
@given(order=orders(), step=st.integers(0, 1000))
def test_the_ranks_parts_make_the_same_global_batch_whatever_the_world(order: Order, step: int) -> None:
    whole = order.batch(step)
    for world in divisors(order.global_batch):
        parts = [order.rank_batch(step, world, rank) for rank in range(world)]
        assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
        assert np.array_equal(np.concatenate([part.epochs for part in parts]), whole.epochs)


@settings(max_examples=25, deadline=None)
@given(order=orders(), steps=st.lists(st.integers(0, 80), min_size=1, max_size=8))
def test_seeking_gives_what_the_stream_gives(order: Order, steps: list[int]) -> None:
    stream = [order.batch(step).ids for step in range(max(steps) + 1)]
    other = pickle.loads(pickle.dumps(order))
    for step in steps:
        assert np.array_equal(other.batch(step).ids, stream[step])


def test_fewer_streams_than_ranks_keep_fewer_shards_in_use() -> None:
    """A set of shards of 10 000 on one node of 8 ranks: at most two shards a rank before the first step."""
    few, usual = (Order([10_000] * 5_000, 0, 4096, streams) for streams in (8, None))
    assert len(few.shards(0, 1)) <= 2 * 8 < len(usual.shards(0, 1)) / 16
    assert few.streams_of(64, 8) == range(1, 2) and few.streams_of(4, 1) == range(2, 4)
    first = few.steps_per_epoch // 3
    shards = len(few.shards(first, first + 1000))
    assert shards * 10_000 / (1000 * 4096) <= 1.3, "bytes downloaded for each byte used"


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    first, second = (Order([100, 100], seed, 20) for seed in (0, 1))
    assert not np.array_equal(first.batch(0).ids, second.batch(0).ids)
    assert not np.array_equal(first.batch(0).ids, first.batch(first.steps_per_epoch).ids)


def test_the_order_never_changes_between_versions() -> None:
    batch = Order([5, 3, 4], 7, 4).batch(2)
    assert [(number >> 32, number & 0xFFFFFFFF) for number in batch.ids.tolist()] == [(0, 4), (2, 1), (2, 3), (0, 0)]


def test_the_remainder_rotates() -> None:
    order = Order([10], 0, 4)
    steps = order.samples_per_epoch * 40 // order.global_batch
    seen = np.concatenate([order.batch(step).ids for step in range(steps)])
    counts = np.bincount(seen.astype(np.int64), minlength=10)
    assert counts.min() > 0.6 * 40
    assert counts.sum() == order.samples_per_epoch * 40


def test_a_batch_mixes_shards() -> None:
    order = Order([1000] * 20, 0, 64)
    shards = [len(set((order.batch(step).ids >> np.uint64(32)).tolist())) for step in range(10)]
    assert min(shards) >= 18


def test_streams_default_to_the_common_divisor_with_256() -> None:
    assert [Order([10_000], 0, batch).streams for batch in (128, 96, 1000, 7)] == [math.gcd(b, 256) for b in (128, 96, 1000, 7)]


def test_illegal_sizes_are_refused_with_the_legal_ones() -> None:
    with pytest.raises(ConfigError, match="1, 2, 3, 4, 6 or 12"):
        Order([100], 0, 12, streams=5)
    with pytest.raises(ConfigError, match="Use 1, 2, 3, 4, 6 or 12 ranks"):
        Order([100], 0, 12).check_world(5)
    with pytest.raises(ConfigError, match="rank 2 does not exist"):
        Order([100], 0, 12).rank_batch(0, 2, 2)
    with pytest.raises(ConfigError, match="must be positive"):
        Order([100], 0, 0)
    with pytest.raises(ConfigError, match="negative"):
        Order([100], 0, 4).batch(-1)


def test_fewer_samples_than_a_global_batch_are_refused() -> None:
    with pytest.raises(DataError, match="11 usable samples are fewer than one global batch of 12"):
        Order([5, 6], 0, 12)
    assert sorted(Order([5, 7], 0, 12).batch(0).ids.tolist()) == sorted(valid_ids(Order([5, 7], 0, 12)))


def test_epochs_are_counted_by_the_first_sample_of_a_step() -> None:
    order = Order([10], 0, 4)
    for step in range(30):
        assert order.epoch_of(step) == order.batch(step).epochs[0]


def test_seeking_far_into_a_huge_set_is_quick() -> None:
    order = Order([10_000] * 100_000, 0, 4096, streams=512)
    with cpu_limit(20):  # what walks through samples or steps takes hours
        batch = order.rank_batch(10**7, 64, 5)
    assert len(batch.ids) == 64
