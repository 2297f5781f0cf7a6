"""Weights: each sample occurs in an epoch as often as its weight says, rounded down or up, in the order of a pure function."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.index.selected import UNIT
from pipeline.data.order.order import Order, Source, divisors
from pipeline.errors import DataError
from tests.helpers.limits import cpu_limit


class Weights:
    """Weights in memory."""

    def __init__(self, shards: list[list[float]]) -> None:
        self.units = [np.rint(np.array(shard) * UNIT).astype(np.uint32) for shard in shards]

    @property
    def totals(self) -> NDArray[np.int64]:
        """Sum of each shard's weights."""
        return np.array([units.sum(dtype=np.int64) for units in self.units], dtype=np.int64)

    @property
    def largest(self) -> int:
        """The largest weight."""
        return max((int(units.max(initial=0)) for units in self.units), default=0)

    def of(self, shard: int) -> NDArray[np.uint32]:
        """The weights of a shard."""
        return self.units[shard]

    def flat(self) -> dict[int, float]:
        """The weight of each sample."""
        return {shard << 32 | row: int(u) / UNIT for shard, units in enumerate(self.units) for row, u in enumerate(units)}


def weighted(shards: list[list[float]], seed: int = 3, batch: int = 4, streams: int = 2, block: int = 5) -> tuple[Order, Weights]:
    weights = Weights(shards)
    return Order([len(shard) for shard in shards], seed, batch, streams, block, weights={0: weights}), weights


@st.composite
def orders(draw: st.DrawFn) -> tuple[Order, Weights]:
    weight = st.one_of(st.floats(0.001, 4), st.sampled_from([1.0, 2.0, 0.5, 1 / UNIT, 7.25]))
    shard = st.lists(weight, max_size=20)
    shards = draw(st.lists(shard, min_size=1, max_size=6).filter(lambda s: sum(map(sum, s)) >= 9))
    streams = draw(st.sampled_from([1, 2, 4]))
    return weighted(shards, draw(st.integers(0, 1 << 40)), streams * draw(st.integers(1, 2)), streams, draw(st.integers(1, 30)))


def by_epoch(order: Order, epochs: int) -> list[Counter[int]]:
    """How often each sample occurs in each epoch, also in what the streams leave out at an epoch's end."""
    dataset = order.datasets[0]
    counters = []
    for epoch in range(epochs):
        ids, _ = dataset._ids(epoch, np.arange(dataset.total))
        counters.append(Counter(ids.tolist()))
    return counters


@settings(max_examples=60, deadline=None)
@given(drawn=orders())
def test_in_each_epoch_a_sample_occurs_as_often_as_its_weight_rounded_down_or_up(drawn: tuple[Order, Weights]) -> None:
    order, weights = drawn
    flat = weights.flat()
    for counter in by_epoch(order, 5):
        assert sum(counter.values()) == int(weights.totals.sum()) // UNIT
        for number, weight in flat.items():
            # The points lie a little more than 1 apart, if the weights do not sum up to an integer.
            assert np.floor(weight * order.datasets[0].total * UNIT / int(weights.totals.sum())) <= counter[number]
            assert counter[number] <= np.ceil(weight)


@settings(max_examples=30, deadline=None)
@given(drawn=orders(), seed=st.integers(0, 9))
def test_over_many_epochs_every_sample_has_its_share(drawn: tuple[Order, Weights], seed: int) -> None:
    order, weights = drawn
    epochs = 200
    total = sum(by_epoch(order, epochs), Counter())
    scale = order.datasets[0].total * UNIT / int(weights.totals.sum())
    for number, weight in weights.flat().items():
        assert abs(total[number] - epochs * weight * scale) < 4


@settings(max_examples=40, deadline=None)
@given(drawn=orders(), steps=st.lists(st.integers(0, 80), min_size=1, max_size=6))
def test_any_world_and_any_seek_give_the_same_batches(drawn: tuple[Order, Weights], steps: list[int]) -> None:
    order, _ = drawn
    stream = [order.batch(step) for step in range(max(steps) + 1)]
    other = pickle.loads(pickle.dumps(order))
    for step in steps:
        for world in divisors(order.global_batch):
            parts = [other.rank_batch(step, world, rank) for rank in range(world)]
            assert np.array_equal(np.concatenate([part.ids for part in parts]), stream[step].ids)
            assert np.array_equal(np.concatenate([part.epochs for part in parts]), stream[step].epochs)


@settings(max_examples=40, deadline=None)
@given(drawn=orders())
def test_no_pass_over_a_sample_occurs_twice(drawn: tuple[Order, Weights]) -> None:
    order, _ = drawn
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(4 * order.steps_per_epoch + 3):
        batch = order.batch(step)
        seen.update(zip(batch.ids.tolist(), batch.epochs.tolist(), strict=True))
    assert max(seen.values()) == 1


@settings(max_examples=40, deadline=None)
@given(drawn=orders())
def test_the_steps_of_a_sample_and_the_shards_of_steps_are_those_of_the_batches(drawn: tuple[Order, Weights]) -> None:
    order, weights = drawn
    last = 3 * order.steps_per_epoch + 2
    where: dict[int, list[int]] = {}
    used: list[set[int]] = []
    for step in range(last):
        ids = order.batch(step).ids.tolist()
        used.append({number >> 32 for number in ids})
        for number in ids:
            where.setdefault(number, []).append(step)
    for number in weights.flat():
        assert order.steps_of(number, 0, last) == where.get(number, [])
    for step in range(last):
        assert used[step] <= set(order.shards(step, step + 1))


def test_equal_weights_of_one_are_an_epoch_of_each_sample_once() -> None:
    order, weights = weighted([[1.0] * 7, [], [1.0] * 5])
    for counter in by_epoch(order, 4):
        assert counter == Counter(weights.flat().keys())


def test_a_mixture_weights_one_of_its_data_sets() -> None:
    weights = Weights([[3.0, 0.5, 0.5]])
    sources = [Source("plain", 0, 1), Source("weighted", 1, 1)]
    order = Order([8, 3], 1, 4, 2, 5, sources, weights={1: weights})
    assert order.samples_per_epoch == 8 + 4
    seen = Counter(number for step in range(30) for number in order.batch(step).ids.tolist())
    assert seen[1 << 32] == pytest.approx(30, abs=2)
    assert all(seen[row] == pytest.approx(10, abs=2) for row in range(8))
    assert seen[1 << 32 | 1] == pytest.approx(5, abs=2)


def test_weights_that_sum_up_to_less_than_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match=r"3 usable samples \(the sum of their weights\) are fewer than one global batch of 4"):
        weighted([[0.5] * 7])


def test_the_order_of_weighted_samples_never_changes_between_versions() -> None:
    order, _ = weighted([[1.0, 2.0, 0.5], [0.25, 3.0]], seed=7)
    batches = [order.batch(step) for step in range(2)]
    assert [(n >> 32, n & 0xFFFFFFFF) for batch in batches for n in batch.ids.tolist()] == [
        *((0, 0), (0, 1), (1, 1), (1, 0)),
        *((0, 1), (1, 1), (1, 1), (1, 1)),
    ]
    assert [n for batch in batches for n in batch.epochs.tolist()] == [0, 0, 1, 0, 1, 3, 0, 5]


def test_seeking_far_into_a_huge_weighted_set_is_quick() -> None:
    class Equal(Weights):
        def __init__(self) -> None:
            self._totals = np.full(50_000, 10_000 * UNIT // 2, dtype=np.int64)

        @property
        def totals(self) -> NDArray[np.int64]:
            return self._totals

        @property
        def largest(self) -> int:
            return UNIT // 2

        def of(self, shard: int) -> NDArray[np.uint32]:
            return np.full(10_000, UNIT // 2, dtype=np.uint32)

    order = Order([10_000] * 50_000, 0, 4096, 512, weights={0: Equal()})
    with cpu_limit(20):
        assert len(order.rank_batch(10**7, 64, 5).ids) == 64
