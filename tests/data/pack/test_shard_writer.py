"""The writer: the same samples give the same bytes, no shard is seen before it is whole, what is written can be indexed."""

from __future__ import annotations

import errno
import gc
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.data.index.build import Fields, index_shard
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.errors import DataError


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_shards_roll_over_and_are_deterministic(tmp_path: Path) -> None:
    written = []
    for place in ("a", "b"):
        with ShardWriter(tmp_path / place, "x", samples_per_shard=3) as writer:
            for n in range(7):
                writer.write({"__key__": f"{n}", "jpg": jpeg(n), "cls": n, "txt": "größe", "json": {"b": 1, "a": [2]}})
        written.append([Path(path).read_bytes() for path in writer.shards])
        assert [Path(path).name for path in writer.shards] == ["x-00000.tar", "x-00001.tar", "x-00002.tar"]
    assert written[0] == written[1]
    counts = [len(index_shard(path, fields=Fields()).keys) for path in writer.shards]
    assert counts == [3, 3, 1]


def test_shards_roll_over_by_bytes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x", bytes_per_shard=1000) as writer:
        for n in range(4):
            writer.write({"__key__": f"{n}", "jpg": bytes(400)})
    assert len(writer.shards) == 2


def test_an_unfinished_shard_is_never_seen(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "x", samples_per_shard=1) as writer:
        writer.write({"__key__": "0", "jpg": b"1"})
        writer.write({"__key__": "1", "jpg": b"1"})
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["x-00000.tar"]


def test_keys_that_would_read_back_otherwise_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x") as writer, pytest.raises(DataError, match="cannot be used"):
        writer.write({"__key__": "a.b", "jpg": b"1"})


def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x") as writer:
        writer.write({"__key__": "p/" + "long" * 40, "jpg": b"1", "seg.png": b"2", "txt": "é"})
    (sample,) = webdataset.WebDataset(writer.shards[0], shardshuffle=False)
    assert (sample["__key__"], sample["jpg"], sample["seg.png"], sample["txt"]) == ("p/" + "long" * 40, b"1", b"2", "é".encode())


ODD = [
    {"__key__": "b/2", "jpg": b"1" * 700, "txt": "größe", "cls": 3, "_hidden": b"2", "a.json": {"b": 1}},
    {"__key__": "größe", "jpg": b"", "txt": "x"},
    {"__key__": "p/" + "long" * 40, "seg.png": bytes(20_000), "jpg": b"1"},
]


def test_the_bytes_are_those_of_a_pax_tar_with_fixed_headers_and_the_samples_order(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x") as writer:
        for sample in ODD:
            writer.write(sample)
    expected = io.BytesIO()
    contents = [b"1" * 700, "größe".encode(), b"3", b"2", b'{"b": 1}', b"", b"x", bytes(20_000), b"1"]
    names = [f"{sample['__key__']}.{extension}" for sample in ODD for extension in sample if extension != "__key__"]
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for name, data in zip(names, contents, strict=True):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    assert Path(writer.shards[0]).read_bytes() == expected.getvalue()
    with tarfile.open(writer.shards[0]) as tar:
        headers = {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode, e.type) for e in tar}
    assert headers == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


def test_webdataset_reads_every_member_of_every_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x", samples_per_shard=2) as writer:
        for sample in ODD:
            writer.write(sample)
    assert len(writer.shards) == 2
    samples = list(webdataset.WebDataset(writer.shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [sample["__key__"] for sample in ODD]
    assert [set(sample) - {"__url__", "__local_path__"} for sample in samples] == [set(sample) for sample in ODD]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_no_shard_and_one_error(tmp_path: Path) -> None:
    class Full(io.RawIOBase):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path, "x") as writer:
        writer.write({"__key__": "0", "jpg": b"1"})
        writer._tar.tarstream.fileobj.fileobj = Full()
        writer.write({"__key__": "1", "jpg": bytes(100_000)})
    del writer
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extension", ["jp\ng", "j\x1b[31m", "\u202ejpg", "\ud800", "jpg\x00z", "a\\b"])
def test_an_extension_that_cannot_be_unpacked_or_printed_is_refused(tmp_path: Path, extension: str) -> None:
    with pytest.raises(DataError, match="extension cannot be used"), ShardWriter(tmp_path, "p") as writer:
        writer.write({"__key__": "a", extension: b"1"})
    assert not list(tmp_path.iterdir())
