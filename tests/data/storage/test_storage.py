"""Which shards a pattern names, and reading ranges of them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pipeline.data import storage
from pipeline.data.storage import local
from pipeline.errors import DataError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"a-{number:05d}.tar").write_bytes(bytes([number]) * 1000)
    (tmp_path / "readme.txt").write_text("no shard")
    return tmp_path


def names(found: list[str]) -> list[str]:
    return [Path(one).name for one in found]


def test_ranges_globs_directories_and_lists_name_the_same_shards(shards: Path) -> None:
    wanted = [f"a-{number:05d}.tar" for number in range(4)]
    assert names(storage.expand(f"{shards}/a-{{00000..00003}}.tar")) == wanted
    assert names(storage.expand(f"{shards}/a-*.tar")) == wanted
    assert names(storage.expand(str(shards))) == wanted
    assert names(storage.expand([f"{shards}/a-{{00000..00001}}.tar", f"file://{shards}/a-{{00002..00003}}.tar"])) == wanted


def test_a_list_keeps_its_order(shards: Path) -> None:
    assert names(storage.expand([f"{shards}/a-00003.tar", f"{shards}/a-00001.tar"])) == ["a-00003.tar", "a-00001.tar"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a-{00002..00009}.tar", ("a-00004.tar", "and 5 more of 8", "does not exist")),
        ("b-*.tar", ("no shard matches", "b-*.tar")),
        ("a-00001.tar.gz", ("a-00001.tar.gz", "does not exist")),
        ("a-{00000..00001.tar", ("a-{00000..00001.tar",)),
    ],
)
def test_missing_shards_are_named(shards: Path, pattern: str, words: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        storage.expand(f"{shards}/{pattern}")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_pattern_and_a_directory_without_tars_are_refused(tmp_path: Path) -> None:
    for patterns in ("", [], [" "]):
        with pytest.raises(DataError, match="no shard pattern"):
            storage.expand(patterns)
    with pytest.raises(DataError, match="contains no"):
        storage.expand(str(tmp_path))


def test_a_shard_named_twice_is_refused(shards: Path) -> None:
    with pytest.raises(DataError, match="named twice"):
        storage.expand([f"{shards}/a-00001.tar", f"{shards}/../{shards.name}/a-*.tar"])


def test_an_unknown_scheme_and_a_missing_bucket_name_are_refused() -> None:
    with pytest.raises(DataError, match="scheme 'ftp' is not supported"):
        storage.expand("ftp://host/a.tar")
    with pytest.raises(DataError, match="has no bucket"):
        storage.expand("s3:///a.tar")


def test_ranges_are_read_exactly_and_short_reads_raise(shards: Path) -> None:
    path = shards / "range.bin"
    path.write_bytes(bytes(range(256)))
    assert storage.read(str(path), 10, 5) == bytes(range(10, 15))
    assert storage.read(str(path), 10, 0) == b""
    with pytest.raises(DataError, match="4 bytes short"):
        storage.read(str(path), 250, 10)
    with pytest.raises(DataError, match="cannot be read"):
        storage.read(str(path) + "x", 0, 1)


def test_the_tag_changes_with_the_file(shards: Path) -> None:
    path = shards / "a-00000.tar"
    before = storage.stat(str(path))
    path.write_bytes(b"other")
    after = storage.stat(str(path))
    assert before.tag != after.tag
    assert (before.size, after.size) == (1000, 5)


def test_many_threads_read_more_files_than_stay_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.bin" for number in range(local._OPEN_FILES + 20)]
    for number, path in enumerate(paths):
        path.write_bytes(number.to_bytes(4, "little") * 64)
    wrong: list[int] = []

    def work(first: int) -> None:
        for step in range(400):
            number = (first + step * 7) % len(paths)
            if storage.read(str(paths[number]), 8, 4) != number.to_bytes(4, "little"):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_user_id_without_a_name_has_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data.settings import StorageSettings
    from pipeline.data.storage import cache_folder

    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    for name in ("FOVEA_CACHE", "SLURM_TMPDIR", "LOCAL_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("getpass.getuser", unknown)
    assert cache_folder(StorageSettings()).name == f"fovea-shards-uid-{os.getuid()}"


def test_a_link_where_a_file_is_put_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"copy")
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / ".x.part").symlink_to(tmp_path / "victim")
    (tmp_path / "shared" / "x").symlink_to(tmp_path / "victim")
    storage.Storage().put(tmp_path / "source", str(tmp_path / "shared" / "x"))
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert (tmp_path / "shared" / "x").read_bytes() == b"copy" and not (tmp_path / "shared" / "x").is_symlink()
