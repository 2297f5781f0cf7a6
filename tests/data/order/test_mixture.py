"""A mixture is a pure function too: shares that hold to a sample, passes of its own for each data set, any world, any seek."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order.interleave import PERIOD
from pipeline.data.order.order import Order, Source, divisors
from pipeline.errors import ConfigError, DataError
from tests.helpers.limits import cpu_limit


def mixture(
    sets: list[list[int]],
    *,
    weights: list[float] | None = None,
    repeats: list[float] | None = None,
    seed: int = 3,
    batch: int = 16,
    streams: int | None = None,
    block: int = 7,
) -> Order:
    """Data sets given by their shards' samples."""
    sources, at = [], 0
    for number, counts in enumerate(sets):
        weight = weights[number] if weights else None
        sources.append(Source("abcdefgh"[number], at, len(counts), weight, repeats[number] if repeats else 1.0))
        at += len(counts)
    return Order([n for counts in sets for n in counts], seed, batch, streams, block, sources)


@st.composite
def mixtures(draw: st.DrawFn) -> Order:
    streams = draw(st.sampled_from([1, 2, 4, 8]))
    counts = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(lambda c: sum(c) >= streams)
    sets = draw(st.lists(counts, min_size=2, max_size=4))
    share = st.one_of(st.floats(0.01, 100), st.integers(1, 5).map(float), st.just(1e-4))
    given_ = draw(st.lists(share, min_size=len(sets), max_size=len(sets)))
    kind = draw(st.sampled_from(["weights", "repeats"]))
    return mixture(
        sets,
        **{kind: given_},  # type: ignore[arg-type]
        seed=draw(st.integers(0, 1 << 40)),
        batch=streams * draw(st.integers(1, 4)),
        streams=streams,
        block=draw(st.integers(1, 30)),
    )


def source_of(order: Order, ids: np.ndarray) -> np.ndarray:
    ends = np.cumsum([source.shards for source in order.sources])
    return np.searchsorted(ends, (ids >> np.uint64(32)).astype(np.int64), side="right")


def stream(order: Order, steps: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and epochs ``[streams, places]`` of some steps, stream by stream in time."""
    batches = [order.batch(step) for step in range(first, first + steps)]
    shape = (order.streams, -1)
    return (
        np.concatenate([batch.ids.reshape(shape) for batch in batches], axis=1),
        np.concatenate([batch.epochs.reshape(shape) for batch in batches], axis=1),
    )


@settings(max_examples=20, deadline=None)
@given(order=mixtures())
def test_each_pass_of_a_set_takes_its_samples_once_in_every_stream_one_after_the_other(order: Order) -> None:
    steps = min(3 * order.steps_per_epoch + 2, 100)
    ids, epochs = stream(order, steps)
    labels = source_of(order, ids.reshape(-1)).reshape(ids.shape)
    for number in range(len(order.sources)):
        own = order.datasets[number]
        span = own.span
        passes: dict[int, list[int]] = {}
        for row in range(order.streams):
            mine = labels[row] == number
            count = int(mine.sum())
            assert epochs[row][mine].tolist() == [k // span for k in range(count)]
            expected = own.samples([row], [0], [count])[0] + (np.uint64(order.sources[number].first) << np.uint64(32))
            assert np.array_equal(ids[row][mine], expected)
            for epoch, sample in zip(epochs[row][mine].tolist(), ids[row][mine].tolist(), strict=True):
                passes.setdefault(epoch, []).append(sample)
        for samples in passes.values():
            assert len(set(samples)) == len(samples) <= own.span * order.streams
        assert own.total - own.span * order.streams < order.streams


@settings(max_examples=30, deadline=None)
@given(order=mixtures(), period=st.integers(0, 10**6))
def test_shares_hold_to_a_few_samples_in_every_stream_at_any_time_and_over_all_streams(order: Order, period: int) -> None:
    slots, sets = period * PERIOD, len(order.sources)
    taken = np.array([order._interleaver.taken(row, slots) for row in range(order.streams)], dtype=object)
    shares = [Fraction(weight, sum(order._interleaver.weights)) for weight in order._interleaver.weights]
    for number, share in enumerate(shares):
        assert abs(max(abs(n - share * slots) for n in taken[:, number])) <= sets + 1
        assert abs(sum(taken[:, number]) - share * slots * order.streams) <= 2 * (sets + 1) + share * order.streams * sets
    assert all(sum(row) == slots for row in taken)
    labels, positions = order._interleaver._table(0, period)
    after = order._interleaver.taken(0, slots + PERIOD)
    for number in range(sets):
        assert positions[labels == number].tolist() == list(range(taken[0][number], after[number]))


@settings(max_examples=20, deadline=None)
@given(order=mixtures(), slots=st.integers(0, 3000))
def test_what_a_set_has_had_never_shrinks(order: Order, slots: int) -> None:
    for row in {0, order.streams - 1}:
        before, after = order._interleaver.taken(row, slots), order._interleaver.taken(row, slots + 1)
        assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0] * (len(before) - 1) + [1]


@settings(max_examples=20, deadline=None)
@given(order=mixtures(), step=st.integers(0, 5000))
def test_the_ranks_parts_make_the_same_global_batch_whatever_the_world(order: Order, step: int) -> None:
    whole = order.batch(step)
    assert len(whole.ids) == len(whole.epochs) == order.global_batch
    for world in divisors(order.global_batch):
        parts = [pickle.loads(pickle.dumps(order)).rank_batch(step, world, rank) for rank in range(world)]
        assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
        assert np.array_equal(np.concatenate([part.epochs for part in parts]), whole.epochs)


@settings(max_examples=15, deadline=None)
@given(order=mixtures(), steps=st.lists(st.integers(0, 80), min_size=1, max_size=5))
def test_seeking_gives_what_the_rowgives(order: Order, steps: list[int]) -> None:
    ids, _ = stream(order, max(steps) + 1)
    each, fresh = order.global_batch // order.streams, pickle.loads(pickle.dumps(order))
    for step in steps:
        assert np.array_equal(fresh.batch(step).ids.reshape(order.streams, -1), ids[:, step * each : (step + 1) * each])


def test_a_set_that_is_repeated_shows_each_sample_so_often_in_an_epoch() -> None:
    order = mixture([[1000, 1048], [2048]], repeats=[3, 1], batch=64, streams=8)
    assert order.samples_per_epoch == 3 * 2048 + 2048 == 8 * PERIOD  # so that no shuffled period straddles two epochs
    for epoch in range(2):
        ids, epochs = stream(order, order.steps_per_epoch, epoch * order.steps_per_epoch)
        seen = Counter(ids.reshape(-1).tolist())
        assert {number: count for number, count in seen.items() if count != (3 if number >> 32 < 2 else 1)} == {}
        assert len(seen) == 4096
        assert set(epochs.reshape(-1).tolist()) == {epoch, 3 * epoch, 3 * epoch + 1, 3 * epoch + 2}


def test_without_weights_and_repeats_the_sets_keep_their_natural_shares() -> None:
    order = mixture([[160], [480], [64]])
    assert order.fractions == pytest.approx((160 / 704, 480 / 704, 64 / 704))
    assert (order.total, order.samples_per_epoch, order.steps_per_epoch) == (704, 704, 44)


@pytest.mark.parametrize("rare", [1e-4, 1e-6])
def test_weights_are_honoured_however_small(rare: float) -> None:
    order = mixture([[100], [100], [64]], weights=[0.7, 0.3 - rare, rare], batch=512, streams=64)
    slots = 10**9
    taken = order._interleaver.taken(17, slots)
    assert [n / slots for n in taken] == pytest.approx([0.7, 0.3 - rare, rare], rel=1e-4)
    # Over all streams a rare set comes evenly: never nothing for long, never many at once.
    each = [
        sum(
            order._interleaver.taken(row, (p + 1) * PERIOD)[2] - order._interleaver.taken(row, p * PERIOD)[2] for row in range(64)
        )
        for p in range(40)
    ]
    assert max(each) - min(each) <= 3
    assert sum(each) == pytest.approx(rare * 64 * PERIOD * 40, abs=4)


def test_batches_hold_the_sets_in_their_shares() -> None:
    order = mixture([[1000], [1000]], weights=[3, 1], batch=256, streams=16)
    labels = [source_of(order, order.batch(step).ids).mean() for step in range(128)]
    assert np.mean(labels) == pytest.approx(0.25, abs=0.002)
    assert max(abs(share - 0.25) for share in labels) < 0.15


def test_one_set_alone_is_seen_once_a_pass() -> None:
    order = mixture([[30, 34]], weights=[0.2], batch=8, streams=8)
    ids, epochs = stream(order, 8)
    assert sorted(ids.reshape(-1).tolist()) == sorted(shard << 32 | row for shard, n in enumerate((30, 34)) for row in range(n))
    assert not epochs.any()


def test_sets_do_not_shuffle_alike_and_seeds_differ() -> None:
    order = mixture([[64], [64]], batch=8)
    first, second = (order.datasets[n].samples([0], [0], [8])[0] for n in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(mixture([[64], [64]], seed=4).batch(0).ids, mixture([[64], [64]]).batch(0).ids)


def test_the_mixture_never_changes_between_versions() -> None:
    batch = mixture([[5, 3], [9]], weights=[1, 2], batch=8, streams=4).batch(3)
    assert [(number >> 32, number & 0xFFFFFFFF) for number in batch.ids.tolist()] == [
        (0, 2),
        (0, 1),
        (0, 4),
        (2, 8),
        (2, 2),
        (2, 5),
        (1, 1),
        (2, 8),
    ]
    assert batch.epochs.tolist() == [0, 0, 0, 3, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("sources", "error", "text"),
    [
        ([Source("small", 0, 1), Source("large", 1, 1)], DataError, "'small' has 3 usable samples, fewer than the 4 streams"),
        ([Source("a", 0, 2, 1.0), Source("b", 2, 0, 1.0)], ConfigError, "'b' do not follow"),
        ([Source("a", 1, 1)], ConfigError, "'a' do not follow"),
        ([Source("a", 0, 1)], ConfigError, "have 1 shards, the manifest 2"),
        ([Source("a", 0, 1), Source("a", 1, 1)], ConfigError, "one name"),
        ([Source("a", 0, 1, 1.0), Source("b", 1, 1)], ConfigError, "others not"),
        ([Source("a", 0, 1, 0.0), Source("b", 1, 1, 1.0)], ConfigError, "'a' is not positive"),
        ([Source("a", 0, 1, None, -1.0), Source("b", 1, 1)], ConfigError, "'a' is not positive"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(sources: list[Source], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Order([3, 100], 0, 8, 4, sources=sources)


def test_illegal_worlds_and_steps_are_refused() -> None:
    order = mixture([[64], [64]], batch=12, streams=4)
    with pytest.raises(ConfigError, match="Use 1, 2, 3, 4, 6 or 12 ranks"):
        order.check_world(5)
    with pytest.raises(ConfigError, match="rank 2 does not exist"):
        order.rank_batch(0, 2, 2)
    with pytest.raises(ConfigError, match="negative"):
        order.batch(-1)
    with pytest.raises(ConfigError, match="do not divide the global batch"):
        mixture([[64]], batch=12, streams=5)


# ---- looking up, for one data set and for several -------------------------------------------------------------------------


def orders() -> st.SearchStrategy[Order]:
    plain = st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda c: sum(c) >= 16), st.integers(1, 30))
    return st.one_of(plain.map(lambda drawn: Order(drawn[0], 5, 16, 8, drawn[1])), mixtures())


@settings(max_examples=30, deadline=None)
@given(order=orders(), first=st.integers(0, 60), length=st.integers(0, 80), pick=st.integers(0, 10**6))
def test_the_steps_of_a_sample_are_those_whose_batch_holds_it(order: Order, first: int, length: int, pick: int) -> None:
    counts = [count for dataset in order.datasets for count in dataset.counts.tolist()]
    everything = [shard << 32 | row for shard, count in enumerate(counts) for row in range(count)]
    number = everything[pick % len(everything)]
    batches = {step: order.batch(step).ids.tolist() for step in range(first, first + length)}
    expected = [step for step, ids in batches.items() for _ in range(ids.count(number))]
    assert order.steps_of(number, first, first + length) == expected


@settings(max_examples=40, deadline=None)
@given(order=orders(), first=st.integers(0, 300), length=st.integers(0, 40), data=st.data())
def test_the_shards_of_some_steps_are_told_and_few_others(order: Order, first: int, length: int, data: st.DataObject) -> None:
    world = data.draw(st.sampled_from(divisors(order.global_batch)))
    rank = data.draw(st.integers(0, world - 1))
    streams = order.streams_of(world, rank)
    told = order.shards(first, first + length, streams)
    parts = [order.rank_batch(step, world, rank).ids for step in range(first, first + length)]
    used = set((np.concatenate(parts) >> np.uint64(32)).tolist()) if parts else set()
    assert used <= set(told)
    assert len(set(told)) == len(told)
    if len(order.datasets) == 1 and length:
        # Each is in a block that these steps touch: reading a stream from the block's first to its last step uses it.
        each, margin = order.global_batch // order.streams, -(-order.block_size // (order.global_batch // order.streams)) + 1
        own = slice(streams.start * each, streams.stop * each)
        near = [order.batch(s).ids[own] for s in range(max(0, first - margin), first + length + margin)]
        assert set(told) <= set((np.concatenate(near) >> np.uint64(32)).tolist()), each


@pytest.mark.parametrize("seed", range(6))
def test_a_block_that_runs_over_the_end_of_the_shards_goes_on_at_their_beginning(seed: int) -> None:
    order = Order([3, 0, 2, 1] * 3, seed, 8, streams=4, block_size=5)
    for step in range(10):
        assert set((order.batch(step).ids >> np.uint64(32)).tolist()) <= set(order.shards(step, step + 1))


def test_shards_come_in_the_order_of_their_first_use() -> None:
    order = Order([50] * 40, 1, 8, streams=4, block_size=50)
    told = order.shards(0, order.steps_per_epoch)
    assert sorted(told) == list(range(40))
    first_use = [
        min(order.steps_of(shard << 32 | row, 0, order.steps_per_epoch) or [10**6] for row in range(50))[0] for shard in told
    ]
    late = [max(0, max(first_use[:at], default=0) - step) for at, step in enumerate(first_use)]
    assert max(late) <= 25  # steps of a block
    mixed = mixture([[50] * 10, [500]], weights=[1, 3], batch=8, streams=4, block=50)
    assert mixed.shards(0, 4)[0] in mixed.shards(0, 1000)[:10]
    assert set(mixed.shards(0, 1000)) == set(range(11))
    assert mixed.shards(5, 5) == []


def test_what_is_no_sample_is_in_no_step() -> None:
    for order in (Order([5, 20], 0, 8), mixture([[5], [20]], streams=4)):
        for number in (5, 2 << 32, 1 << 32 | 20):
            with pytest.raises(DataError, match="no sample"):
                order.steps_of(number, 0, 10)


def test_a_huge_mixture_seeks_looks_up_and_prefetches_quickly() -> None:
    sources = [Source(f"s{n}", n * 10_000, 10_000, weight) for n, weight in enumerate((10.0, 1.0, 0.1, 1e-3, 1e-4))]
    order = Order([10_000] * 50_000, 0, 4096, streams=512, sources=sources)
    with cpu_limit(20):  # what walks through samples or steps takes hours
        batch = order.rank_batch(10**7, 64, 5)
        assert len(set(batch.ids.tolist())) == 64
        for step in range(10**7 + 1, 10**7 + 21):
            order.rank_batch(step, 64, 5)
        assert 10**7 in order.steps_of(int(batch.ids[7]), 10**7 - 1000, 10**7 + 1000)
        told = order.shards(10**7, 10**7 + 100, range(40, 48))
    assert set((batch.ids >> np.uint64(32)).tolist()) <= set(told)


def test_shards_of_a_rare_set_come_when_it_does() -> None:
    order = mixture([[50] * 30, [50] * 30], weights=[9, 1], batch=8, streams=4, block=5)
    steps = 600
    told = order.shards(0, steps)
    first_use = [
        min(step for row in range(50) for step in order.steps_of(shard << 32 | row, 0, steps) or [steps]) for shard in told
    ]
    late = [max(0, max(first_use[:at], default=0) - step) for at, step in enumerate(first_use)]
    assert any(shard >= 30 for shard in told) and max(late) <= 60  # steps of a block of the rare set, and some


def test_many_legal_sizes_are_shortened_in_a_message() -> None:
    for power, expected in (
        (15, "16384 or 32768"),
        (16, "1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, …, 16384, 32768 or 65536"),
    ):
        with pytest.raises(ConfigError) as caught:
            Order([10**6], 0, 2**power, streams=3)
        assert expected in str(caught.value) and ("…" in str(caught.value)) == (power > 15)
