"""Keys: whatever a source calls its samples, what is written stays inside the folder it is unpacked to."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.index.build import Fields, index_shard
from pipeline.data.pack.keys import is_safe, safe_extension, safe_key, unique_keys
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.data.pack.sources import open_source
from pipeline.errors import DataError
from tests.data.pack.test_packer import packed, picture
from tests.data.pack.test_sources import write_tar

HOSTILE = {
    "../../../tmp/x": "_/_/_/tmp/x",
    "/etc/x": "etc/x",
    "//etc/x": "etc/x-1",
    "a/../../x": "a/_/_/x",
    "C:/x": "C_/x",
    "C:\\x": "C__x",
    "a\nb": "a_b",
    "a\x1b]0;title\x07": "a_]0;title_",
    "rtl\u202egpj": "rtl_gpj",
    "caf\udce9": "caf\ufffd",
    "\ufeffa": "_a",
}
PLAIN = ["000000001", "train/n01440764/x", "./train.v1/00000", "größe/日本", "a b", "~x", "a-1", "p/" + "long" * 40]


@pytest.mark.parametrize("key", PLAIN)
def test_plain_keys_stay_as_they_are(key: str) -> None:
    assert safe_key(key) == key and is_safe(key)


@given(st.one_of(st.text(alphabet="./\\a:C\n\x1b\udce9", max_size=12), st.text(max_size=300), st.just("x" * 5000)))
def test_any_key_becomes_safe_and_stays_so(key: str) -> None:
    clean = safe_key(key)
    assert is_safe(clean) and safe_key(clean) == clean
    assert not clean.startswith("/") and ".." not in clean.split("/") and clean.rpartition("/")[2]
    assert len(clean.encode()) <= 1000
    assert "/" not in safe_extension(key) and safe_extension(key)


def test_hostile_keys_are_changed_counted_and_unpack_inside(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", [(f"{key}.jpg", picture(n)) for n, key in enumerate(HOSTILE) if "." not in key.rpartition("/")[2]]
    )
    report = packed(tmp_path / "a.tar", tmp_path / "out", seed=None)
    keys = index_shard(report.shards[0], fields=Fields()).keys
    assert keys == (
        "_/_/_/tmp/x",
        "etc/x",
        "etc/x-1",
        "a/_/_/x",
        "C_/x",
        "C__x",
        "a_b",
        "a_]0;title_",
        "rtl_gpj",
        "caf\ufffd",
        "_a",
    )
    assert report.account.noted == {"key_changed": 11} and report.account.packed == 11
    with tarfile.open(report.shards[0]) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert len([path for path in (tmp_path / "unpacked").rglob("*") if path.is_file()]) == 11


def test_keys_that_meet_after_cleaning_and_extensions_are_all_kept(tmp_path: Path) -> None:
    members = [("../x.jpg", picture(1)), ("_/x.jpg", picture(2)), ("y.jpg", picture(3)), ("y.a\nb", b"1"), ("y.a\rb", b"2")]
    write_tar(tmp_path / "a.tar", members)
    report = packed(tmp_path / "a.tar", tmp_path / "out", seed=None)
    with tarfile.open(report.shards[0]) as archive:
        names = archive.getnames()
    assert names == ["_/x.jpg", "_/x-1.jpg", "y.jpg", "y.a_b", "y.a_b_"]
    assert report.account.noted == {"extension_changed": 1, "key_changed": 1, "key_numbered": 1}


def test_files_that_differ_in_case_alone_are_two_samples(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "00000"
    folder.mkdir(parents=True)
    for name in ("1.jpg", "1.JPG"):
        (folder / name).write_bytes(picture(len(name)))
    source = open_source(tmp_path / "in", layout="files")
    assert [source.key(n, 0) for n in range(len(source))] == ["1", "1-1"]


@pytest.mark.parametrize("key", ["../x", "/x", "a\nb", "caf\udce9", "a\\b"])
def test_the_writer_refuses_unsafe_keys(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path, "x") as writer, pytest.raises(DataError, match="cannot be used"):
        writer.write({"__key__": key, "jpg": b"1"})


@given(st.lists(st.sampled_from(["../x", "_/x", "_/x-1", "/x", "x"]), max_size=10))
def test_cleaned_keys_are_unique(keys: list[str]) -> None:
    actual = unique_keys(safe_key(key) for key in keys)
    assert len(set(actual)) == len(keys)
