"""Indexes of images with declared channels: what differs is counted; indexes of RGB images are those of earlier versions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.augment.decode import ChannelDecoder, Decoder, decoder_of
from pipeline.data.formats.channels import Channels
from pipeline.data.index.build import build
from pipeline.data.index.fields import COUNTED, STATUSES, Fields
from pipeline.data.index.manifest import Manifest
from pipeline.data.index.shard_table import ShardTable
from pipeline.data.index.sidecar import sidecar_stem
from pipeline.data.loader.reader import Reader
from pipeline.errors import DataError
from tests.helpers.channel_images import npy_file, random_image, tiff_file, write_tar

THREE = Fields(images=("tif", "npy"), channels=Channels(3, "uint16"))


def mixed(folder: Path) -> str:
    good = [
        (f"good{n}", {"tif" if n % 2 else "npy": (tiff_file if n % 2 else npy_file)(random_image("uint16", 3, seed=n))})
        for n in range(4)
    ]
    bad = [
        ("four", {"tif": tiff_file(random_image("uint16", 4))}),
        ("bytes", {"tif": tiff_file(random_image("uint8", 3))}),
        ("floats", {"npy": npy_file(random_image("float32", 3))}),
        ("page", {"tif": b"<html>not found</html>"}),
        ("short", {"npy": npy_file(random_image("uint16", 3))[:-1]}),
        ("small", {"npy": npy_file(random_image("uint16", 3, 8, 40))}),
        ("none", {"cls": b"3"}),
    ]
    return write_tar(folder / "mixed.tar", [*good, *bad])


def test_every_sample_that_differs_is_counted(tmp_path: Path) -> None:
    manifest = build([mixed(tmp_path)], tmp_path / "index", fields=THREE)
    assert manifest.counts == {
        "ok": 4,
        "missing_image": 1,
        "not_image": 1,
        "truncated": 1,
        "too_small": 1,
        "other_channels": 1,
        "other_dtype": 2,
    }
    again = Manifest.load(tmp_path / "index")
    assert again.counts == manifest.counts and again.fields == THREE
    assert [shard.counts for shard in again.shards] == [manifest.counts]


def test_what_is_accepted_is_decoded_as_stored(tmp_path: Path) -> None:
    manifest = build([mixed(tmp_path)], tmp_path / "index", fields=THREE)
    records = Reader(manifest).fetch(manifest.ids())
    decoder = decoder_of(manifest.fields, threads=2)
    assert isinstance(decoder, ChannelDecoder)
    for number, image in enumerate(decoder.decode([record.image or b"" for record in records])):
        assert image.dtype == np.float32 and np.array_equal(image, random_image("uint16", 3, seed=number))
    assert decoder.decode([b"", b"nonsense", tiff_file(random_image("uint8", 3))]) == [None, None, None]
    assert decoder.blank(16).shape == (16, 16, 3)
    assert isinstance(decoder_of(Fields()), Decoder)


@pytest.mark.parametrize("name", ["short", "a/" + "long" * 40])
def test_files_of_one_image_are_read_at_once_in_the_declared_order(tmp_path: Path, name: str) -> None:
    channels = Channels(3, "uint16", members=("b02.tif", "b03.tif", "b04.npy"))
    samples = []
    for n in range(3):
        image = random_image("uint16", 3, seed=n)
        members = {
            "b04.npy": npy_file(image[:, :, 2]),
            "txt": b"between them",
            "b02.tif": tiff_file(image[:, :, :1]),
            "b03.tif": tiff_file(image[:, :, 1:2]),
            "cls": str(n).encode(),
        }
        samples.append((f"{name}{n}", members))
    samples.append((f"{name}lacking", {"b02.tif": samples[0][1]["b02.tif"]}))
    url = write_tar(tmp_path / "stacks.tar", samples)
    manifest = build([url], tmp_path / "index", fields=Fields(images=channels.members, channels=channels))
    assert manifest.counts == {"ok": 3, "missing_image": 1}
    records = Reader(manifest).fetch(manifest.ids())
    assert [record.label for record in records] == [0, 1, 2] and records[0].caption == "between them"
    for n, image in enumerate(decoder_of(manifest.fields).decode([record.image or b"" for record in records])):
        assert np.array_equal(image, random_image("uint16", 3, seed=n))
    changed = bytearray(Path(url).read_bytes())
    at = records[1].image
    assert at is not None
    changed[bytes(changed).index(at) + 600] ^= 1
    Path(url).write_bytes(bytes(changed))
    assert [record.status for record in Reader(manifest).fetch(manifest.ids())] == ["ok", "corrupt", "ok"]


def test_rules_of_rgb_images_are_stored_as_before() -> None:
    document = asdict(Fields())
    del document["channels"]
    assert Fields().document() == document
    rules = json.dumps([3, 10, "tag", document], sort_keys=True)
    stem = hashlib.blake2b(f"/data/a.tar\0{rules}".encode(), digest_size=8).hexdigest()
    assert sidecar_stem("/data/a.tar", 10, "tag", Fields()) == f"a.tar-{stem}"
    assert sidecar_stem("/data/a.tar", 10, "tag", THREE) != sidecar_stem("/data/a.tar", 10, "tag", Fields(images=THREE.images))


def test_tables_of_rgb_images_count_the_statuses_of_earlier_versions(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", [("a", {"npy": npy_file(random_image("uint16", 3))}), ("b", {"jpg": b"no"})])
    with pytest.raises(DataError):
        build([url], tmp_path / "rgb")
    manifest = build([url], tmp_path / "index", fields=THREE)
    table, _ = ShardTable.open(tmp_path / "index" / "manifest.npz")
    assert len(table._arrays["counts"]) == COUNTED < len(STATUSES)
    assert manifest.counts == {"ok": 1, "missing_image": 1}
