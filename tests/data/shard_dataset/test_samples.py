"""What a sample of the library holds, how it is decoded, and what stands for one that cannot be used."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import ShardDataset
from pipeline.data.index.tar import walk, walk_indexed
from pipeline.data.storage import Storage, stat
from pipeline.errors import ConfigError, TrainingError
from tests.helpers.library import jpeg, sample, write
from tests.helpers.opened import BATCH, Opener, is_bad


def test_a_sample_has_its_members_as_bytes_whatever_their_order(opened: Opener) -> None:
    seen = {one["__key__"]: one for one in opened()}
    assert len(seen) > 45
    for key, one in seen.items():
        if is_bad(one):
            continue
        number = int(key.rpartition("/")[2])
        assert {name: data for name, data in one.items() if not name.startswith("__")} == sample(number)
        assert one["__label__"] == number % 7
        assert one["__url__"].endswith(f"{key[:3]}.tar")


def test_members_that_are_not_wanted_are_not_returned(opened: Opener) -> None:
    one = next(iter(opened(members=["cls"])))
    assert {name for name in one if not name.startswith("__")} == {"jpg", "cls"}


def test_decoded_samples(opened: Opener) -> None:
    for kind, check in (
        ("rgb8", lambda image: isinstance(image, np.ndarray) and image.shape == (16, 20, 3)),
        ("torchrgb8", lambda image: isinstance(image, torch.Tensor) and image.shape == (3, 16, 20)),
        ("pil", lambda image: isinstance(image, Image.Image) and image.size == (20, 16)),
    ):
        one = next(iter(opened(decode=kind)))
        number = int(one["__key__"].rpartition("/")[2])
        assert check(one["jpg"])
        assert (one["cls"], one["json"]["number"]) == (number % 7, number)
        assert one["vec.bin"] == sample(number)["vec.bin"]
        assert np.array_equal(
            np.asarray(opened(decode="rgb8").batch(0)[0]["jpg"]), np.asarray(Image.open(io.BytesIO(jpeg(number))))
        )
    with pytest.raises(ConfigError, match="Choose one of pil"):
        opened(decode="pytorch")


def test_captions_alternate_by_epoch(opened: Opener) -> None:
    dataset = opened(caption_lines=True, decode="rgb8")
    chosen: dict[str, set[str]] = {}
    for _ in range(8):
        for one in dataset:
            assert one["txt"] == one["__caption__"]
            chosen.setdefault(one["__key__"], set()).add(one["txt"].split()[0])
    assert set().union(*chosen.values()) == {"first", "second"}
    assert sum(len(texts) == 2 for texts in chosen.values()) > 40
    again = opened(caption_lines=True, decode="rgb8")
    assert [one["txt"] for one in again.batch(3)] == [one["txt"] for one in dataset.batch(3)]


def test_bad_samples_are_substituted_counted_and_recorded(opened: Opener, tmp_path: Path) -> None:
    """An image that cannot be decoded: another sample of its shard takes its place, the one that a run would use."""
    dataset = opened(decode="rgb8", bad_samples=tmp_path / "bad", max_bad_fraction=0.5)
    number = 1 << 32 | 3
    with pytest.MonkeyPatch.context() as patch:
        from pipeline.data import sample_source

        real = sample_source._decoded
        patch.setattr(sample_source, "_decoded", lambda record, *rest: None if record.id == number else real(record, *rest))
        samples = [one for _ in range(2) for one in dataset]
    bad = [one for one in samples if is_bad(one)]
    assert 1 <= len(bad) <= 2
    assert all(one["__bad__"] == "undecodable" and one["__key__"].startswith("a-1/") for one in bad)
    assert dataset.bad_samples is not None
    assert (dataset.bad_samples.seen, dict(dataset.bad_samples.reasons)) == (len(samples), {"undecodable": len(bad)})
    lines = [json.loads(line) for line in (tmp_path / "bad" / "rank-0-worker-0.jsonl").read_text().splitlines()]
    assert [(line["key"], line["step"]) for line in lines] == [
        (dataset.source.manifest.rows(1).keys[3], one["__position__"] // BATCH) for one in bad
    ]
    substitutes = [dataset.source.reader.substitute(number, one["__epoch__"], 5, 0) for one in bad]
    assert [line["substitute"] for line in lines] == substitutes


def test_a_changed_image_is_substituted_without_decoding_and_too_many_stop(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.tar"
    write(path, {f"{n:03d}": sample(n) for n in range(16)})
    dataset = ShardDataset(
        str(path), global_batch_size=4, index=str(tmp_path / "index"), max_bad_fraction=0.001, bad_fraction_window=8
    )
    before = path.stat()
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offsets = [member.offset_data for member in tar if member.name.endswith("jpg")]
    data[offsets[3] + 300] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(TrainingError, match="could not be used"):
        list(dataset)
    assert [one["__bad__"] for step in range(4) for one in dataset.batch(step)].count("corrupt") == 1
    for offset in offsets:
        data[offset + 300] ^= 0xFF if offset != offsets[3] else 0
    path.write_bytes(data)
    gray = dataset.batch(0)[0]
    assert Image.open(io.BytesIO(gray["jpg"])).size == (64, 64)
    assert (gray["__label__"], gray["__caption__"], gray["__bad__"]) == (-1, "", "corrupt")


def test_indexed_walk_yields_what_the_strict_walk_yields(tmp_path: Path) -> None:
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        names = {f"{'d' * 60}/{n:03d}{'x' * 60}": sample(n) for n in range(8)}
        names[f"{'long/' * (30 if form != tarfile.USTAR_FORMAT else 1)}1"] = sample(8)
        write(path, names, format=form)
        with tarfile.open(path, "a", format=form) as tar:
            tar.addfile(tarfile.TarInfo("folder"))
            link = tarfile.TarInfo("z.link")
            link.type, link.linkname = tarfile.SYMTYPE, "a"
            tar.addfile(link)
        source = Storage().open(stat(str(path)))
        members = list(walk(source))
        assert list(walk_indexed(source, 0)) == members
        start = members[5].offset - 512
        if form == tarfile.USTAR_FORMAT:
            assert list(walk_indexed(source, start)) == members[5:]


def test_images_of_declared_channels_are_yielded_as_stored(tmp_path: Path) -> None:
    from tests.helpers.channel_images import npy_file, random_image
    from tests.helpers.channel_images import write_tar as channel_shard

    shard = channel_shard(tmp_path / "a.tar", [(f"{n}", {"npy": npy_file(random_image("float32", 4, seed=n))}) for n in range(8)])
    options = {"global_batch_size": 8, "index": tmp_path / "index", "channels": {"count": 4, "dtype": "float32"}}
    for kind, shape in (("array", (24, 30, 4)), ("tensor", (4, 24, 30))):
        samples = ShardDataset(shard, decode=kind, **options).batch(0)  # type: ignore[arg-type]
        assert len(samples) == 8
        for one in samples:
            image, expected = one["npy"], random_image("float32", 4, seed=int(one["__key__"]))
            assert tuple(image.shape) == shape
            assert np.array_equal(image if kind == "array" else image.numpy().transpose(1, 2, 0), expected)
    with pytest.raises(ConfigError, match="not decoded as 'rgb8'"):
        ShardDataset(shard, decode="rgb8", **options)  # type: ignore[arg-type]


def test_the_substitute_of_last_resort_has_the_declared_channels(tmp_path: Path) -> None:
    from tests.helpers.channel_images import npy_file, random_image
    from tests.helpers.channel_images import write_tar as channel_shard

    bad = random_image("float32", 2)
    bad[0, 0, 0] = np.nan
    shard = channel_shard(tmp_path / "a.tar", [(f"{n}", {"npy": npy_file(bad)}) for n in range(8)])
    channels = {"count": 2, "dtype": "float32"}
    dataset = ShardDataset(
        shard, decode="array", global_batch_size=8, index=tmp_path / "index", channels=channels, max_bad_fraction=1.0
    )
    (sample, *_) = dataset.batch(0)
    assert sample["__bad__"] == "undecodable" and not sample["npy"].any() and sample["npy"].shape == (64, 64, 2)
