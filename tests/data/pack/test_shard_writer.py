"""The writer: the same samples give the same bytes, no shard is seen before it is whole, what is written can be indexed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
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
    webdataset = pytest.importorskip("webdataset")
    with ShardWriter(tmp_path, "x") as writer:
        writer.write({"__key__": "p/" + "long" * 40, "jpg": b"1", "seg.png": b"2", "txt": "é"})
    (sample,) = webdataset.WebDataset(writer.shards[0], shardshuffle=False)
    assert (sample["__key__"], sample["jpg"], sample["seg.png"], sample["txt"]) == ("p/" + "long" * 40, b"1", b"2", "é".encode())
