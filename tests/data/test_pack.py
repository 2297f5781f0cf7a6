"""Packing: the same samples give the same bytes, what is broken is counted, what is written can be indexed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.index import Fields, build, index_shard
from pipeline.data.pack import ShardWriter, pack_folder
from pipeline.data.reader import Reader
from pipeline.errors import DataError


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "pictures"
    for number, name in enumerate(["zebra", "cat", "dog dog"]):
        (source / name).mkdir(parents=True)
        for n in range(4):
            (source / name / f"{n}.v1.JPG").write_bytes(jpeg(10 * number + n))
    (source / "cat" / "broken.jpg").write_bytes(jpeg(0)[:100])
    (source / "cat" / "page.jpg").write_bytes(b"<html>")
    (source / "cat" / "notes.txt").write_text("no picture")
    return source


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


def test_a_folder_of_classes_becomes_labelled_shuffled_shards(folder: Path, tmp_path: Path) -> None:
    report = pack_folder(folder, tmp_path / "out", samples_per_shard=5)
    assert report.classes == ("cat", "dog dog", "zebra")
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog dog\nzebra\n"
    assert (report.packed, len(report.shards)) == (12, 3)
    assert report.skipped == (("cat/broken.jpg", "truncated"), ("cat/page.jpg", "not_image"))
    assert report.reasons == {"not_image": 1, "truncated": 1}
    assert (tmp_path / "out" / "skipped.txt").read_text() == "truncated\tcat/broken.jpg\nnot_image\tcat/page.jpg\n"
    manifest = build(list(report.shards), tmp_path / "index")
    labels = [record.label for record in Reader(manifest).fetch(manifest.ids())]
    assert manifest.total == 12
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert labels != sorted(labels)
    pictures = {record.image for record in Reader(manifest).fetch(manifest.ids())}
    assert pictures == {jpeg(10 * number + n) for number in range(3) for n in range(4)}


def test_packing_again_gives_the_same_bytes_and_never_overwrites_unasked(folder: Path, tmp_path: Path) -> None:
    first = [Path(path).read_bytes() for path in pack_folder(folder, tmp_path / "out").shards]
    with pytest.raises(DataError, match="there already"):
        pack_folder(folder, tmp_path / "out")
    again = pack_folder(folder, tmp_path / "out", overwrite=True)
    assert [Path(path).read_bytes() for path in again.shards] == first
    other = pack_folder(folder, tmp_path / "other", seed=1)
    assert [Path(path).read_bytes() for path in other.shards] != first


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_gives_labels_and_captions(folder: Path, tmp_path: Path, kind: str) -> None:
    rows = [
        {"path": "zebra/0.v1.JPG", "caption": 'a zebra, "striped"', "label": "zebra"},
        {"path": "cat/0.v1.JPG", "caption": "", "label": "cat"},
        {"path": "cat/gone.jpg", "caption": "x", "label": "cat"},
    ]
    table = folder / f"table.{kind}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table.write_text(
            'path,caption,label\nzebra/0.v1.JPG,"a zebra, ""striped""",zebra\ncat/0.v1.JPG,,cat\ncat/gone.jpg,x,cat\n'
        )
    report = pack_folder(table, tmp_path / "out")
    assert report.skipped == (("cat/gone.jpg", "missing_file"),)
    manifest = build(list(report.shards), tmp_path / "index")
    records = sorted((r.label, r.caption, r.image) for r in Reader(manifest).fetch(manifest.ids()))
    assert records == [(0, None, jpeg(10)), (1, 'a zebra, "striped"', jpeg(0))]
    assert report.classes == ("cat", "zebra")


def test_what_cannot_be_packed_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("file,label\n1,2\n")
    (tmp_path / "bad.jsonl").write_text('{"path": "a"}\n{"nope": 1}\n')
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.jpg").write_bytes(b"no")
    cases = {
        "gone": "does not exist",
        "empty": "no pictures",
        "bad.csv": "no column",
        "bad.jsonl": "bad.jsonl:2",
        "only": "none of 1",
    }
    for name, words in cases.items():
        with pytest.raises(DataError, match=words):
            pack_folder(tmp_path / name, tmp_path / "out" / name)
