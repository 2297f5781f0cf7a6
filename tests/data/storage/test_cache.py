"""The node's cache: bounded, whole, shared, and in order again after every way to die."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.data.storage import ObjectStat
from pipeline.data.storage.cache import CacheFull, ShardCache
from pipeline.errors import DataError
from tests.helpers.runs import ROOT, environment

SIZE = 100_000


def shard(name: str, size: int = SIZE, tag: str = '"1"') -> ObjectStat:
    return ObjectStat(f"s3://bucket/{name}.tar", size, tag)


def content(about: ObjectStat) -> bytes:
    return (about.url.encode() * (about.size // len(about.url) + 1))[: about.size]


class Source:
    """Where shards come from; counts downloads."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.asked: list[str] = []
        self._seconds = seconds

    def __call__(self, about: ObjectStat, descriptor: int) -> None:
        self.asked.append(about.url)
        time.sleep(self._seconds)
        os.pwrite(descriptor, content(about), 0)


def test_a_shard_is_downloaded_once_and_is_whole(tmp_path: Path) -> None:
    cache, source = ShardCache(tmp_path, limit=10**7), Source()
    for _ in range(3):
        assert cache.ensure(shard("a"), source).read_bytes() == content(shard("a"))
    assert source.asked == [shard("a").url]
    assert cache.has(shard("a"))
    assert not cache.has(shard("a", tag='"2"'))


def test_equal_names_in_different_folders_do_not_collide(tmp_path: Path) -> None:
    cache, source = ShardCache(tmp_path, limit=10**7), Source()
    one, two = ObjectStat("s3://b/x/0.tar", SIZE, ""), ObjectStat("s3://b/y/0.tar", SIZE, "")
    assert cache.ensure(one, source) != cache.ensure(two, source)


def test_it_never_holds_more_than_its_limit_and_evicts_the_longest_unused(tmp_path: Path) -> None:
    cache, source = ShardCache(tmp_path, limit=3 * SIZE), Source()
    for number, name in enumerate("abc"):
        os.utime(cache.ensure(shard(name), source), (number, number))
    cache.ensure(shard("a"), source)  # used again
    cache.ensure(shard("d"), source)
    assert cache.held() <= 3 * SIZE
    assert [name for name in "abcd" if cache.has(shard(name))] == ["a", "c", "d"]


def test_what_a_living_job_needs_is_not_evicted_and_what_a_dead_one_needed_is(tmp_path: Path) -> None:
    mine, other, source = ShardCache(tmp_path, limit=2 * SIZE), ShardCache(tmp_path, limit=2 * SIZE), Source()
    for name in "ab":
        mine.ensure(shard(name), source)
    mine.need([shard("a"), shard("b")])
    with pytest.raises(CacheFull):
        other.ensure(shard("c"), source)
    mine.need([shard("b")])
    other.ensure(shard("c"), source)
    assert mine.has(shard("b"))
    assert not mine.has(shard("a"))
    mine.close()
    other.ensure(shard("d"), source)
    assert not mine.has(shard("b"))


def test_a_reader_keeps_what_it_opened_when_the_shard_is_evicted(tmp_path: Path) -> None:
    cache, source = ShardCache(tmp_path, limit=SIZE), Source()
    with cache.ensure(shard("a"), source).open("rb") as file:
        cache.ensure(shard("b"), source)
        assert not cache.has(shard("a"))
        assert file.read() == content(shard("a"))


def test_several_who_want_the_same_shard_get_it_by_one_download(tmp_path: Path) -> None:
    source = Source(seconds=0.2)
    caches = [ShardCache(tmp_path, limit=10**7) for _ in range(4)]
    threads = [threading.Thread(target=cache.ensure, args=(shard("a"), source)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.asked == [shard("a").url]
    assert not list(tmp_path.glob(".*.part"))


def _endless(about: ObjectStat, descriptor: int) -> None:
    os.pwrite(descriptor, b"half", 0)
    time.sleep(600)


def _download_forever(folder: Path) -> None:
    cache = ShardCache(folder, limit=10**7)
    cache.need([shard("z")])
    cache.ensure(shard("a"), _endless)


def test_killed_in_the_middle_of_a_download_nothing_half_is_ever_read_and_nothing_is_left(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_download_forever, args=(tmp_path,))
    child.start()
    while not [part for part in tmp_path.glob(".*.part") if part.stat().st_size]:
        time.sleep(0.01)
    waiting, source, got = ShardCache(tmp_path, limit=10**7), Source(), []
    thread = threading.Thread(target=lambda: got.append(waiting.ensure(shard("a"), source).read_bytes()))
    thread.start()
    time.sleep(0.1)
    assert not got, "a half shard was taken for a whole one"
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    thread.join(timeout=200)
    assert got == [content(shard("a"))]
    ShardCache(tmp_path, limit=10**7)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".lock"]


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(about: ObjectStat, descriptor: int) -> None:
        raise DataError("is away", where=about.url)

    cache = ShardCache(tmp_path, limit=10**7)
    with pytest.raises(DataError, match="is away"):
        cache.ensure(shard("a"), fails)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_disk_that_takes_no_more_is_found_before_the_download(tmp_path: Path) -> None:
    """The kernel refuses the room itself, as on a full disk; a file's size may be limited without being root."""
    cache, source = ShardCache(tmp_path, limit=10**9), Source()
    cache.ensure(shard("a"), source)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))
    try:
        with pytest.raises(CacheFull):
            cache.ensure(shard("b", size=2 * SIZE), source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert source.asked == [shard("a").url], "it was asked for although there was no room"
    assert not list(tmp_path.glob(".*.part"))
    assert cache.has(shard("a"))


def test_old_shards_make_room_for_what_must_stay_free_on_the_disk(tmp_path: Path) -> None:
    cache, source = ShardCache(tmp_path, limit=10**9), Source()
    for number, name in enumerate("abc"):
        os.utime(cache.ensure(shard(name), source), (number, number))
    cache.floor = shutil.disk_usage(tmp_path).free + 10**12
    with pytest.raises(CacheFull):
        cache.ensure(shard("d"), source)
    assert not any(cache.has(shard(name)) for name in "abc"), "room was not even looked for"
    cache.floor = 0
    cache.ensure(shard("d"), source)
    cache.need([shard("d")])
    cache.floor = shutil.disk_usage(tmp_path).free + 10**12
    with pytest.raises(CacheFull):
        cache.ensure(shard("e"), source)
    assert cache.has(shard("d")), "what a living job needs was evicted"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"data\.storage\.cache"):
        ShardCache(tmp_path / "file" / "below")


HAMMER = """
import os, random, sys, time
from pathlib import Path
from tests.data.storage.test_cache import SIZE, Source, content, shard
from pipeline.data.storage.cache import CacheFull, ShardCache
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
draw, cache, source = random.Random(seed), ShardCache(Path(folder), limit=6 * SIZE), Source(0.001)
while True:
    names = draw.sample("abcdefghijkl", 2)
    cache.need([shard(name) for name in names])
    for name in names:
        try:
            path = cache.ensure(shard(name), source)
        except CacheFull:
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            print("BAD: needed but evicted", flush=True)
            continue
        print("ok" if data == content(shard(name)) else "BAD: other bytes", flush=True)
"""


@pytest.mark.slow
def test_many_processes_killed_at_random_moments_never_see_a_half_shard(tmp_path: Path) -> None:
    folder, logs = tmp_path / "cache", []
    for seed in range(6):
        log = (tmp_path / f"{seed}.log").open("w")
        words = [sys.executable, "-c", HAMMER, str(folder), str(seed)]
        logs.append((subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=log, stderr=log), tmp_path / f"{seed}.log"))
    end = time.monotonic() + 900
    while time.monotonic() < end and not all(path.read_text().count("ok") > 10 for _, path in logs):
        time.sleep(0.1)
    for process, _ in logs[:5]:
        process.kill()
        process.wait()
        time.sleep(0.05)
    last, log = logs[5]
    after = log.read_text().count("ok")
    end = time.monotonic() + 900
    while time.monotonic() < end and log.read_text().count("ok") < after + 10:
        time.sleep(0.1)
    assert log.read_text().count("ok") >= after + 10, "the survivor stands still"
    last.kill()
    last.wait()
    for _, path in logs:
        text = path.read_text()
        assert "BAD" not in text, text
        assert "Error" not in text, text
    ShardCache(folder, limit=6 * SIZE)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6 * SIZE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_a_folder_that_somebody_else_made_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o777)
    os.chown(folder, 12345, 12345)
    with pytest.raises(DataError, match="must belong to this user"):
        ShardCache(folder, limit=10**7)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(DataError, match="must belong to this user"):
        ShardCache(tmp_path / "link", limit=10**7)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_a_shard_that_somebody_else_put_there_is_not_read(tmp_path: Path) -> None:
    cache, source, about = ShardCache(tmp_path / "own", limit=10**7), Source(), shard("a")
    cache.path(about).write_bytes(b"x" * SIZE)
    os.chown(cache.path(about), 12345, 12345)
    assert not cache.has(about)
    assert cache.ensure(about, source).read_bytes() == content(about)


def test_the_folder_and_its_shards_are_the_users_alone(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir(mode=0o777)
    for name in ("new", "old"):
        cache = ShardCache(tmp_path / name, limit=10**7)
        path = cache.ensure(shard("a"), Source())
        cache.need([shard("a")])
        assert cache.folder.stat().st_mode & 0o077 == 0
        assert all(file.stat().st_mode & 0o077 == 0 for file in cache.folder.iterdir()), path


def test_a_shard_of_another_size_or_kind_is_fetched_again(tmp_path: Path) -> None:
    cache, source, about = ShardCache(tmp_path, limit=10**7), Source(), shard("a")
    cache.path(about).write_bytes(b"ATTACKER SHARD")
    assert cache.ensure(about, source).read_bytes() == content(about)
    cache.path(about).unlink()
    (tmp_path / "poison").write_bytes(b"x" * SIZE)
    cache.path(about).symlink_to(tmp_path / "poison")
    assert not cache.has(about)
    assert cache.ensure(about, source).read_bytes() == content(about)
    assert (tmp_path / "poison").read_bytes() == b"x" * SIZE


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link"])
def test_links_in_the_folder_never_have_another_file_written(tmp_path: Path, kind: str, shared: bool) -> None:
    victim = tmp_path / "victim"
    cache, about = ShardCache(tmp_path / "cache", limit=10**7, shared=shared), shard("a")
    for name in (cache._temporary(cache.path(about)), tmp_path / "cache" / ".lock"):
        name.unlink(missing_ok=True)
        if kind == "hard link":
            victim.write_bytes(b"PRECIOUS")
            os.link(victim, name)
        else:
            if kind == "link":
                victim.write_bytes(b"PRECIOUS")
            name.symlink_to(victim)
        with pytest.raises((DataError, OSError)):
            cache.ensure(about, Source())
        assert not victim.exists() if kind == "dangling link" else victim.read_bytes() == b"PRECIOUS"
        name.unlink(missing_ok=True)


def test_a_folder_shared_with_others_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all").chmod(0o777)
    ShardCache(tmp_path / "all", limit=10**7, shared=True)
    assert "shared with other users" in caplog.text
    os.mkfifo(tmp_path / "all" / ".needs-x")
    (tmp_path / "all" / ".needs-y").write_text("[[1], 3]")
    ShardCache(tmp_path / "all", limit=10**7, shared=True).need([shard("a")])
