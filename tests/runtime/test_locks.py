"""Locks between processes, and work that goes on where a file system has none."""

from __future__ import annotations

import errno
import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.pack import synthetic as scenes
from pipeline.data.storage.cache import ShardCache
from pipeline.data.storage.names import ObjectStat
from pipeline.runtime import locks
from pipeline.runtime.locks import file_system, lock
from tests.helpers.runs import ROOT, TOY, environment

NO_FLOCK = """
#include <errno.h>
#include <stdlib.h>
int flock(int fd, int op) { (void)fd; (void)op; const char *e = getenv("FAKE_ERRNO"); errno = e ? atoi(e) : ENOSYS; return -1; }
"""


def refusing(number: int) -> Callable[[Any, int], None]:
    def flock(*_: Any) -> None:
        raise OSError(number, errno.errorcode[number])

    return flock


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        assert lock(first.fileno(), path, wait=False)
        with pytest.raises(BlockingIOError):
            lock(second.fileno(), path, wait=False)
        first.close()
        assert lock(second.fileno(), path, wait=False)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_work_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    monkeypatch.setattr(locks, "_named", set())
    for name in ("a", "b"):
        with (tmp_path / name).open("w") as file:
            assert not lock(file.fileno(), tmp_path / name, wait=False)
    (said,) = capsys.readouterr().err.splitlines()
    mount, kind = file_system(tmp_path)
    assert str(tmp_path / "a") in said and f"the {kind} file system at {mount}" in said and kind != "?"


def test_other_failures_are_no_missing_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with (tmp_path / "a").open("w") as file, pytest.raises(OSError, match="EIO"):
        lock(file.fileno(), tmp_path / "a")


def test_the_nodes_cache_keeps_shards_whole_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many threads that download one shard at once write no common file."""
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    content = bytes(range(256)) * 400
    about = ObjectStat("s3://bucket/x.tar", len(content), "v1")

    def fetch(_: ObjectStat, descriptor: int) -> None:
        import os

        for at in range(0, len(content), 7000):
            os.pwrite(descriptor, content[at : at + 7000], at)

    caches = [ShardCache(tmp_path / "cache", limit=10**9, floor=0) for _ in range(8)]
    for cache in caches:
        cache.need([about])
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(lambda cache: cache.ensure(about, fetch), caches))
    (path,) = paths
    assert path.read_bytes() == content
    assert about.url and caches[0].held() == len(content)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload, under which no file system has locks."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "noflock.c").write_text(NO_FLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "noflock.so", folder / "noflock.c"], check=True)
    return folder / "noflock.so"


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_every_command_works_without_locks(shim: Path, tmp_path: Path, number: int) -> None:
    made = tmp_path / "scenes"
    scenes.write(made, train=48, val=8, size=32, samples_per_shard=24)
    (tmp_path / "toy.yaml").write_text(TOY)
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    from PIL import Image

    for name in "xyz":
        Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "a" / f"{name}.png")
    variables = environment() | {"LD_PRELOAD": str(shim), "FAKE_ERRNO": str(number)}
    train = [
        "train",
        "toy.yaml",
        f"data.shards={made}/*train-*.tar",
        "data.index=ix",
        "run.directory=run",
        "train.duration=4 steps",
    ]
    for words in (
        ["shards", "index", str(made), "--index", "ix2"],
        ["shards", "verify", str(made), "--index", "ix2"],
        ["shards", "pack", "pictures", "packed"],
        [*train, "schedule.lr.warmup=0", "checkpoint.every=2 steps"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli.main", *words],
            cwd=tmp_path,
            env=variables | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=3000,
            check=False,
        )
        assert done.returncode == 0, f"{words}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        if words[1] in ("verify", "pack") or words[0] == "train":
            assert "cannot be locked" in done.stderr and "file system at" in done.stderr
