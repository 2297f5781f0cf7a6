"""Object storage that answers late, half, wrongly or not at all; every answer comes from a real S3 server behind a proxy."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data import storage
from pipeline.data.index.build import build
from pipeline.data.loader.reader import Reader
from pipeline.data.pack import synthetic as scenes
from pipeline.data.settings import StorageSettings
from pipeline.data.storage import ShardChanged, Storage, StorageUnavailable
from pipeline.data.storage.remote import Remote
from pipeline.errors import DataError
from tests.helpers.limits import hang_limit
from tests.helpers.s3 import KEYS, Proxy, Trouble, proxy, upload

BYTES = random.Random(0).randbytes(3_000_000)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def bucket(s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "big.tar").write_bytes(BYTES)
    scenes.write(folder / "scenes", train=60, val=20, size=32, seed=1, samples_per_shard=20)
    files = {"data/big.tar": folder / "big.tar"}
    files |= {f"scenes/{path.name}": path for path in sorted((folder / "scenes").glob("*.tar"))}
    upload(s3_port, "remote", files)
    upload(s3_port, "public", {"big.tar": folder / "big.tar"}, public=True)
    return str(folder)


@pytest.fixture
def door(s3_port: int, bucket: str) -> Iterator[Proxy]:
    with proxy(s3_port) as found:
        yield found


def settings(door: Proxy, tmp_path: Path, **values: object) -> StorageSettings:
    usual = {
        "endpoint": door.endpoint,
        "cache": tmp_path / "cache",
        "part_size_mb": 1,
        "timeout": 2.0,
        "retries": 1,
        "outage_timeout": 10.0,
    }
    return StorageSettings.model_validate({**usual, **values})


def test_ranges_of_an_object_are_its_bytes(door: Proxy, tmp_path: Path) -> None:
    store = Storage(settings(door, tmp_path, access="range_read"))
    about = store.stat("s3://remote/data/big.tar")
    assert about.size == len(BYTES)
    for offset, length in ((0, 10), (1_000_000, 77), (len(BYTES) - 5, 5), (0, len(BYTES))):
        assert store.read(about, offset, length) == BYTES[offset : offset + length]
    assert store.read(about, 10, 0) == b""


@pytest.mark.parametrize("kind", ["503", "cut", "stall", "403"])
@pytest.mark.parametrize("mode", ["range_read", "cache"])
@pytest.mark.slow
def test_trouble_that_passes_costs_time_and_nothing_else(door: Proxy, tmp_path: Path, kind: str, mode: str) -> None:
    store = Storage(settings(door, tmp_path, access=mode))
    about = store.stat("s3://remote/data/big.tar")
    door.troubles = [Trouble(kind, times=3)]
    assert store.read(about, 100, 2_500_000) == BYTES[100:2_500_100]
    assert door.troubles[0].hit == 3
    if mode == "cache":
        assert store.cache is not None
        assert store.cache.path(about).read_bytes() == BYTES


def test_a_body_that_was_cut_is_not_read_twice(door: Proxy, tmp_path: Path) -> None:
    store = Storage(settings(door, tmp_path, access="range_read"))
    about = store.stat("s3://remote/data/big.tar")
    door.troubles, door.served = [Trouble("cut")], 0
    assert store.read(about, 0, 1_000_000) == BYTES[:1_000_000]
    assert door.served == 1_000_000


def test_storage_that_stays_away_ends_in_a_message_and_not_in_a_substitute(door: Proxy, tmp_path: Path) -> None:
    store = Storage(settings(door, tmp_path, access="range_read", retries=0, outage_timeout=1.5))
    manifest = build(storage.expand("s3://remote/scenes/*train-*.tar", store), tmp_path / "index", store=store)
    reader = Reader(manifest, store=store)
    door.troubles = [Trouble("503", times=10**6)]
    with hang_limit(200), pytest.raises(StorageUnavailable, match=r"did not answer for \d+ s .*503"):
        reader.fetch(manifest.ids()[:1])


def test_an_object_that_was_replaced_is_refused(door: Proxy, tmp_path: Path, s3_port: int) -> None:
    (tmp_path / "a").write_bytes(BYTES[:2_000_000])
    upload(s3_port, "remote", {"data/changing.tar": tmp_path / "a"})
    for mode in ("range_read", "cache"):
        store = Storage(settings(door, tmp_path, access=mode))
        about = store.stat("s3://remote/data/changing.tar")
        (tmp_path / "b").write_bytes(os.urandom(2_000_000))
        upload(s3_port, "remote", {"data/changing.tar": tmp_path / "b"})
        with pytest.raises(ShardChanged, match="replaced since it was indexed"):
            store.read(about, 0, 100)


@pytest.mark.parametrize(
    ("url", "change", "says"),
    [
        ("s3://nosuchbucket/a.tar", {}, "bucket s3://nosuchbucket does not exist"),
        ("s3://nosuchbucket/*.tar", {}, "bucket s3://nosuchbucket does not exist"),
        ("s3://remote/data/*.zip", {}, "no shard matches"),
        ("s3://remote/nothing/", {}, "no shard matches"),
        ("s3://remote/data/big.tar", {"endpoint": "http://127.0.0.1:9"}, "did not answer .* data.storage.endpoint"),
        ("s3://remote/data/big.tar", {"endpoint": "http://no.such.host.invalid"}, "did not answer .* data.storage.endpoint"),
        ("https://127.0.0.1:9/a.tar", {}, "did not answer"),
    ],
)
def test_what_cannot_work_is_refused_and_not_tried_for_as_long_as_an_outage(
    door: Proxy, tmp_path: Path, url: str, change: dict[str, object], says: str
) -> None:
    with hang_limit(200), pytest.raises(DataError, match=says):
        storage.expand(url, Storage(settings(door, tmp_path, **change)))


def test_missing_and_wrong_credentials_are_told_apart(door: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    door.troubles = [Trouble("403", times=100, match="", method="HEAD"), Trouble("403", times=100, match="")]
    with hang_limit(200), pytest.raises(DataError, match=r"access was refused .* AWS_ACCESS_KEY_ID"):
        storage.expand("s3://remote/data/big.tar", Storage(settings(door, tmp_path)))
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with hang_limit(200), pytest.raises(DataError, match=r"no credentials were found .* AWS_ACCESS_KEY_ID"):
        storage.expand("s3://remote/data/big.tar", Storage(settings(door, tmp_path)))


def test_public_data_need_no_credentials(door: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    store = Storage(settings(door, tmp_path, anonymous=True, access="range_read"))
    for url in ("s3://public/big.tar", f"{door.endpoint}/public/big.tar"):
        (found,) = storage.expand(url, store)
        assert store.read(store.stat(found), 7, 90) == BYTES[7:97]
    with pytest.raises(DataError, match="access was refused"):
        storage.expand("s3://remote/data/big.tar", store)


def test_patterns_in_a_bucket_name_what_they_name_on_a_disk(door: Proxy, tmp_path: Path, bucket: str) -> None:
    store = Storage(settings(door, tmp_path))
    here = [path.name for path in sorted(Path(bucket, "scenes").glob("*train*.tar"))]
    for pattern in (
        "s3://remote/scenes/*train-*.tar",
        f"s3://remote/scenes/{here[0][:-5]}{{0..2}}.tar",
        "s3://remote/**/*train*.tar",
    ):
        assert [storage.base_name(url) for url in storage.expand(pattern, store)] == here
    everything = storage.expand("s3://remote/scenes/", store)
    assert len(everything) == len(list(Path(bucket, "scenes").glob("*.tar")))


@pytest.mark.slow
def test_a_remote_index_has_the_fingerprint_of_the_local_one(door: Proxy, tmp_path: Path, bucket: str) -> None:
    far = build(
        storage.expand("s3://remote/scenes/", Storage(settings(door, tmp_path))),
        tmp_path / "far",
        store=Storage(settings(door, tmp_path)),
        workers=2,
    )
    near = build(storage.expand(f"{bucket}/scenes"), tmp_path / "near")
    assert far.fingerprint == near.fingerprint
    ids = near.ids()
    far_records = Reader(far, store=Storage(settings(door, tmp_path))).fetch(ids)
    assert [(r.key, r.image, r.caption, r.label) for r in far_records] == [
        (r.key, r.image, r.caption, r.label) for r in Reader(near).fetch(ids)
    ]
    requests = door.total("GET")
    Reader(far, store=Storage(settings(door, tmp_path))).fetch(ids)
    assert door.total("GET") == requests, "what is in the cache was downloaded again"


def test_a_shard_is_indexed_by_a_few_large_requests(door: Proxy, tmp_path: Path) -> None:
    store = Storage(settings(door, tmp_path))
    (url, *_) = storage.expand("s3://remote/scenes/*train-*.tar", store)
    before = door.total("GET")
    build([url], tmp_path / "index", store=store)
    assert door.total("GET") - before <= 1 + store.stat(url).size // 1_000_000


def test_a_web_server_is_not_searched_for_shards(door: Proxy, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be listed"):
        storage.expand(f"{door.endpoint}/remote/data/*.tar", Storage(settings(door, tmp_path)))


@pytest.mark.parametrize("version", ["", '"0"'])
def test_a_server_without_conditional_writes_is_written_to_at_once(door: Proxy, tmp_path: Path, version: str) -> None:
    door.conditions = False
    remote, url = Remote(settings(door, tmp_path, retries=5)), f"s3://remote/lists/plain{len(version)}.json"
    remote.replace_bytes(b"new", url, version)
    assert remote.read(remote.stat(url), 0, 3) == b"new"
    assert door.total("PUT") == 2 and not remote.counters["retries"], door.seen


def test_other_errors_of_a_conditional_write_never_lead_to_a_plain_one(door: Proxy, tmp_path: Path) -> None:
    remote, url = Remote(settings(door, tmp_path)), "s3://remote/lists/501-NotImplemented.json"
    remote.put_bytes(b"old", url)
    door.troubles = [Trouble("503", match="501", method="PUT")]
    with pytest.raises(ShardChanged):
        remote.replace_bytes(b"new", url, "")
    assert remote.read(remote.stat(url), 0, 3) == b"old"


def _read_in_child(pickled: bytes, queue: multiprocessing.Queue[bytes]) -> None:
    store, about = pickle.loads(pickled)
    queue.put(store.read(about, 5, 20))


@pytest.mark.slow
def test_a_storage_sent_to_another_process_reads_there(door: Proxy, tmp_path: Path) -> None:
    store = Storage(settings(door, tmp_path, access="range_read"))
    about = store.stat("s3://remote/data/big.tar")
    store.read(about, 0, 1)
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[bytes] = context.Queue()
    child = context.Process(target=_read_in_child, args=(pickle.dumps((store, about)), queue))
    child.start()
    assert queue.get(timeout=600) == BYTES[5:25]
    child.join()


def test_a_fork_after_use_is_refused_and_does_not_hang(door: Proxy, tmp_path: Path) -> None:
    store = Storage(settings(door, tmp_path, access="range_read"))
    about = store.stat("s3://remote/data/big.tar")
    child = os.fork()
    if child == 0:
        try:
            store.read(about, 0, 1)
        except DataError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
