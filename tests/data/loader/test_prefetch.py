"""The prefetcher follows the order: what is read next is there before it is read, and never more than there is room for."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.index.build import build
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.prefetch import Prefetcher
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import Order
from pipeline.data.pack import synthetic as scenes
from pipeline.data.settings import StorageSettings
from pipeline.data.storage import Storage, StorageUnavailable, expand
from pipeline.data.storage.cache import ShardCache
from tests.helpers.s3 import KEYS, Proxy, Trouble, proxy, upload


@pytest.fixture(scope="module")
def names(s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=240, val=20, size=32, seed=1, samples_per_shard=20)
    files = {path.name: path for path in sorted(folder.glob("*train-*.tar"))}
    upload(s3_port, "prefetch", files)
    return list(files)


@pytest.fixture
def door(s3_port: int, names: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with proxy(s3_port) as found:
        yield found


@pytest.fixture
def open_storage(door: Proxy, tmp_path: Path) -> Callable[..., Storage]:
    def made(**values: object) -> Storage:
        usual = {"endpoint": door.endpoint, "cache": tmp_path / "cache", "retries": 0, "outage_timeout": 1.0}
        return Storage(StorageSettings.model_validate({**usual, **values}))

    return made


@pytest.fixture
def manifest(open_storage: Callable[..., Storage], tmp_path: Path) -> Manifest:
    store = open_storage()
    return build(expand("s3://prefetch/*train-*.tar", store), tmp_path / "index", store=store)


def until(true: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def test_the_shards_of_the_next_steps_are_there_before_they_are_read_and_no_others(
    manifest: Manifest, open_storage: Callable[..., Storage]
) -> None:
    order, store = Order(manifest.sizes, 3, 8, streams=2, block_size=10), open_storage()
    cache = store.cache
    assert cache is not None
    prefetcher = Prefetcher(manifest, order, store, world=2, rank=1, last=None, horizon=4)
    soon = order.shards(0, 4, range(1, 2))
    assert len(soon) < len(manifest.shards) / 2, "everything is needed at once: the test is too easy"
    prefetcher.start(0)
    until(lambda: all(cache.has(manifest.shards[number].about) for number in soon))
    read = {int(number) >> 32 for step in range(4) for number in order.rank_batch(step, 2, 1).ids}
    assert read <= set(soon)
    time.sleep(0.2)
    assert len(list(cache.folder.glob("*.tar"))) == len(soon)
    prefetcher.advance(12)
    later = order.shards(12, 16, range(1, 2))
    until(lambda: all(cache.has(manifest.shards[number].about) for number in later))
    prefetcher.close()
    ShardCache(cache.folder)
    assert not list(cache.folder.glob(".needs-*")), "a stream that has ended still needs shards"


def test_ranks_of_one_stream_begin_with_different_shards_of_it(manifest: Manifest, open_storage: Callable[..., Storage]) -> None:
    order, begun = Order(manifest.sizes, 3, 8, streams=1, block_size=80), []
    for rank in range(4):
        prefetcher = Prefetcher(manifest, order, open_storage(), world=4, rank=rank, last=None, horizon=4)
        needed = prefetcher.needed(0)
        assert len(needed) >= 4
        turns = prefetcher._in_turn(needed)
        assert sorted(about.url for about in turns) == sorted(about.url for about in needed)
        begun.append(turns[0].url)
    assert len(set(begun)) == 4


def test_it_stays_within_the_cache_and_drops_what_was_read(manifest: Manifest, open_storage: Callable[..., Storage]) -> None:
    biggest = max(shard.size for shard in manifest.shards)
    store = open_storage(cache_gb=3.5 * biggest / 1e9, free_gb=0)
    order = Order(manifest.sizes, 3, 8, streams=1, block_size=10)
    cache = store.cache
    assert cache is not None
    prefetcher = Prefetcher(manifest, order, store, world=1, rank=0, last=order.steps_per_epoch, horizon=order.steps_per_epoch)
    assert 1 <= len(prefetcher.needed(0)) <= 4
    prefetcher.start(0)
    for step in range(order.steps_per_epoch):
        prefetcher.advance(step)
        first = manifest.shards[order.shards(step, step + 1, range(1))[0]].about
        until(lambda about=first: cache.has(about))
        assert cache.held() <= cache.limit
    prefetcher.close()


@pytest.mark.slow
def test_storage_that_is_away_for_a_while_is_asked_again(
    manifest: Manifest, open_storage: Callable[..., Storage], door: Proxy
) -> None:
    order, store = Order(manifest.sizes, 3, 8, streams=2, block_size=10), open_storage(outage_timeout=0.1)
    cache = store.cache
    assert cache is not None
    door.troubles = [Trouble("503", times=4)]
    prefetcher = Prefetcher(manifest, order, store, world=1, rank=0, last=4, horizon=4)
    prefetcher.start(0)
    until(lambda: all(cache.has(about) for about in prefetcher.needed(0)), seconds=60)
    prefetcher.close()


def test_local_shards_and_direct_reading_need_none(
    manifest: Manifest, open_storage: Callable[..., Storage], tmp_path: Path
) -> None:
    scenes.write(tmp_path / "near", train=20, val=5, size=32, seed=1, samples_per_shard=20)
    near = build(expand(f"{tmp_path}/near/*train*.tar"), tmp_path / "near-index")
    assert not Prefetcher.useful(near, open_storage())
    assert not Prefetcher.useful(manifest, open_storage(access="range_read"))
    assert Prefetcher.useful(manifest, open_storage())


def test_samples_of_shards_that_are_still_to_come_are_read_by_range_and_at_once(
    manifest: Manifest, open_storage: Callable[..., Storage], door: Proxy
) -> None:
    store = open_storage()
    store.prefetched = True
    cache = store.cache
    assert cache is not None
    wanted = np.arange(4, dtype=np.uint64) << np.uint64(32)
    expected = Reader(manifest, store=open_storage(access="range_read")).fetch(wanted)
    together = threading.Barrier(4)
    door.served, door.on_request = 0, lambda method, path: together.wait(60) if path.endswith(".tar") else None
    assert Reader(manifest, store=store).fetch(wanted) == expected  # one after the other they would break the barrier
    door.on_request = None
    size = sum(manifest.shards[number].size for number in range(4))
    assert not list(cache.folder.glob("*.tar")) and door.served < size / 2
    for number in range(4):
        assert not store.is_near(manifest.shards[number].about)
        assert store.fetch(manifest.shards[number].about) and store.is_near(manifest.shards[number].about)
    door.served = 0
    sent = pickle.loads(pickle.dumps(Reader(manifest, store=store)))
    assert sent.store.prefetched and sent.fetch(wanted) == expected and door.served == 0
    assert not open_storage().prefetched


def test_a_sample_that_cannot_be_read_by_range_is_reported_and_storage_that_is_away_is_not(
    manifest: Manifest, open_storage: Callable[..., Storage], door: Proxy
) -> None:
    store = open_storage(outage_timeout=0.1)
    store.prefetched = True
    door.troubles = [Trouble("503", times=1000)]
    with pytest.raises(StorageUnavailable):
        Reader(manifest, store=store).fetch(np.arange(3, dtype=np.uint64))
