"""Reading samples by number: the exact bytes, faults told by status, substitutes that never change."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import storage
from pipeline.data.index.build import build
from pipeline.data.index.fields import Fields
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.reader import Reader
from pipeline.errors import DataError


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    urls = []
    for number in range(2):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w") as writer:
            for row in range(5):
                key = f"{number}{row}"
                members = {
                    "jpg": jpeg(10 * number + row),
                    "cls": b"%d" % row,
                    "txt": f"  Bild {key}\n".encode(),
                    "seg.png": b"map" + key.encode(),
                }
                if row == 1:
                    members = {"jpg": b"broken"}
                if row == 4:
                    members = {"jpg": members["jpg"], "json": json.dumps({"caption": "aus json", "label": 9}).encode()}
                for extension, data in members.items():
                    entry = tarfile.TarInfo(f"{key}.{extension}")
                    entry.size = len(data)
                    writer.addfile(entry, io.BytesIO(data))
        urls.append(str(path))
    return build(urls, tmp_path / "index")


def ids(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array([shard << 32 | row for shard, row in pairs], dtype=np.uint64)


def test_records_hold_the_exact_bytes_in_the_order_asked_for(manifest: Manifest) -> None:
    first, second, third = Reader(manifest).fetch(ids((1, 1), (0, 0), (1, 3)))
    assert (first.key, first.shard_name, first.label, first.caption) == ("12", "1.tar", 2, "Bild 12")
    assert (first.image, first.segmentation, first.width, first.height) == (jpeg(12), b"map12", 24, 20)
    assert (second.key, second.image, second.id, second.status) == ("00", jpeg(0), 0, "ok")
    assert (third.caption, third.label, third.segmentation) == ("aus json", 9, None)


def test_only_what_is_wanted_is_read(manifest: Manifest) -> None:
    (record,) = Reader(manifest, wants=("label",)).fetch(ids((0, 0)))
    assert (record.label, record.image, record.caption, record.segmentation) == (0, None, None, None)
    (record,) = Reader(manifest, wants=("caption",)).fetch(ids((0, 0)))
    assert (record.label, record.image, record.caption) == (-1, None, "Bild 00")
    with pytest.raises(DataError, match="'picture' is not a part"):
        Reader(manifest, wants=("picture",))  # type: ignore[arg-type]


def test_every_sample_of_the_manifest_is_readable(manifest: Manifest) -> None:
    records = Reader(manifest).fetch(manifest.ids())
    assert [record.key for record in records] == ["00", "02", "03", "04", "10", "12", "13", "14"]
    assert all(record.status == "ok" for record in records)


def change(manifest: Manifest, row: int, data: bytes, at: int = 0) -> None:
    offset = int(manifest.column(0, "image_offset")[row]) + at
    with open(manifest.shards[0].url, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_changed_bytes_are_told_by_status(manifest: Manifest) -> None:
    change(manifest, 0, b"xx", at=300)
    broken, fine = Reader(manifest).fetch(ids((0, 0), (0, 1)))
    assert (broken.status, broken.image, broken.key) == ("corrupt", None, "00")
    assert fine.status == "ok"
    (unchecked,) = Reader(manifest, checksum=False).fetch(ids((0, 0)))
    assert unchecked.status == "ok"
    change(manifest, 0, b"\0\0", at=int(manifest.column(0, "image_size")[0]) - 2)
    (cut,) = Reader(manifest, checksum=False).fetch(ids((0, 0)))
    assert cut.status == "truncated"


def test_a_shard_that_shrinks_while_it_is_read_gives_statuses_then_a_refusal(manifest: Manifest) -> None:
    reader = Reader(manifest)
    reader.fetch(ids((0, 0)))
    os.truncate(manifest.shards[0].url, int(manifest.column(0, "image_offset")[2]) + 10)
    assert [record.status for record in reader.fetch(ids((0, 0), (0, 2), (0, 3)))] == ["ok", "unreadable", "unreadable"]
    with pytest.raises(DataError, match="when it was indexed"):
        Reader(manifest).fetch(ids((0, 0)))


def test_a_missing_shard_or_sample_is_no_fault_of_the_data(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="no sample"):
        Reader(manifest).fetch(ids((0, 4)))
    with pytest.raises(DataError, match="no sample"):
        Reader(manifest).fetch(ids((2, 0)))
    os.remove(manifest.shards[1].url)
    storage.forget()
    with pytest.raises(DataError, match=r"1\.tar"):
        Reader(manifest).fetch(ids((1, 0)))


def test_a_reader_travels_to_another_process(manifest: Manifest) -> None:
    reader = Reader(manifest)
    reader.fetch(manifest.ids())
    data = pickle.dumps(reader)
    assert len(data) < 3000
    assert pickle.loads(data).fetch(manifest.ids()) == reader.fetch(manifest.ids())


def test_substitutes_are_other_samples_of_the_shard_and_always_the_same(manifest: Manifest) -> None:
    reader = Reader(manifest)
    for number in manifest.ids().tolist():
        chosen = [reader.substitute(number, epoch, 3, attempt) for epoch in range(8) for attempt in range(4)]
        assert number not in chosen
        assert {one >> 32 for one in chosen} == {number >> 32}
        assert {one & 0xFFFFFFFF for one in chosen} == {row for row in range(4) if row != number & 0xFFFFFFFF}
        assert chosen == [Reader(manifest).substitute(number, epoch, 3, attempt) for epoch in range(8) for attempt in range(4)]


def captioned(folder: Path, *, lines: bool = False, require: tuple[str, ...] = ()) -> Manifest:
    said = [
        {"txt": b"one\n\n  two \n three"},
        {"json": json.dumps({"caption": ["a", "", "b", 3, None, "  "]}).encode()},
        {"json": json.dumps({"caption": ["", None, 7]}).encode()},
        {"json": b'{"caption": "single \\ud800"}'},
        {"txt": b" \n\n", "json": json.dumps({"caption": ["instead"]}).encode()},
        {},
        {"txt": b"\xff\xfe broken"},
    ]
    path = folder / "captions.tar"
    with tarfile.open(path, "w") as writer:
        for number, members in enumerate(said):
            for extension, data in {"jpg": jpeg(number), **members}.items():
                entry = tarfile.TarInfo(f"{number}.{extension}")
                entry.size = len(data)
                writer.addfile(entry, io.BytesIO(data))
    return build([str(path)], folder / "index", fields=Fields(caption_lines=lines, require=require))


def test_a_sample_may_have_several_captions_and_no_empty_ones(tmp_path: Path) -> None:
    def said(manifest: Manifest) -> list[tuple[str, ...]]:
        records = Reader(manifest).fetch(manifest.ids())
        assert [record.caption for record in records] == [record.captions[0] if record.captions else None for record in records]
        return [record.captions for record in records]

    rest = [("a", "b"), (), ("single \ufffd",), ("instead",), (), ("\ufffd\ufffd broken",)]
    assert said(captioned(tmp_path)) == [("one\n\n  two \n three",), *rest]
    assert said(captioned(tmp_path, lines=True)) == [("one", "two", "three"), *rest]
    required = captioned(tmp_path, require=("caption",))
    assert required.counts == {"ok": 5, "missing_caption": 2}
    assert all(said(required))
