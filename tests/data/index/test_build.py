"""The index: every sample has a status, sidecars are reused exactly when they may be, damage is collected and named."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import storage
from pipeline.data.index.build import Fields, build, index_shard
from pipeline.data.index.fields import STATUSES
from pipeline.data.index.image_header import inspect_header
from pipeline.data.index.manifest import Manifest
from pipeline.data.index.sidecar import ShardIndex
from pipeline.errors import DataError


def picture(form: str = "JPEG", size: tuple[int, int] = (24, 20), seed: int = 0, orientation: int = 0, **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def shard(path: Path, members: list[tuple[str, bytes]]) -> str:
    temporary = path.with_suffix(".new")
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as writer:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            writer.addfile(entry, io.BytesIO(data))
    os.replace(temporary, path)
    storage.forget()
    return str(path)


def statuses(index: ShardIndex) -> dict[str, str]:
    return {key: STATUSES[code] for key, code in zip(index.keys, index.columns["status"], strict=True)}


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [
        member
        for n in range(first, first + count)
        for member in (
            (f"{n:04d}.jpg", picture(seed=n)),
            (f"{n:04d}.cls", str(n % 3).encode()),
            (f"{n:04d}.txt", b"picture %d" % n),
        )
    ]


def test_columns_point_to_the_bytes(tmp_path: Path) -> None:
    seg = picture("PNG")
    url = shard(
        tmp_path / "a.tar",
        [
            ("x/1.JPG", picture(seed=1)),
            ("x/1.cls", b"7\n"),
            ("x/1.txt", "ein Löwe".encode()),
            ("x/1.seg.png", seg),
            ("2.json", json.dumps({"label": 3, "caption": "said in json"}).encode()),
            ("2.png", picture("PNG", seed=2, size=(33, 17))),
            ("3.jpeg", picture(seed=3)),
        ],
    )
    index = index_shard(url, fields=Fields())
    data, c = Path(url).read_bytes(), index.columns
    assert index.keys == ("x/1", "2", "3")
    assert index.counts == {"ok": 3}
    assert c["label"].tolist() == [7, 3, -1]
    assert c["width"].tolist() == [24, 33, 24]
    assert c["height"].tolist() == [20, 17, 20]
    assert c["caption_source"].tolist() == [1, 2, 0]
    assert data[c["image_offset"][0] :][: c["image_size"][0]] == picture(seed=1)
    assert data[c["caption_offset"][0] :][: c["caption_size"][0]].decode() == "ein Löwe"
    assert data[c["segmentation_offset"][0] :][: c["segmentation_size"][0]] == seg


def test_a_shard_of_trouble_gets_the_expected_statuses(tmp_path: Path) -> None:
    good = picture()
    bomb = bytearray(picture("PNG"))
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    url = shard(
        tmp_path / "a.tar",
        [
            ("good.jpg", good),
            ("lonely.txt", b"no picture"),
            ("html.jpg", b"<html>not found</html>"),
            ("empty.jpg", b""),
            ("cut.jpg", good[: len(good) // 2]),
            ("header.jpg", good[:30]),
            ("cut_png.png", picture("PNG")[:-30]),
            ("gif.jpg", picture("GIF")),
            ("avif.jpg", b"\0\0\0\x20ftypavif" + bytes(100)),
            ("tiny.jpg", picture(size=(4, 400))),
            ("bomb.png", bytes(bomb)),
            ("trailing.jpg", good + b"junk after the end"),
            ("png_inside.jpg", picture("PNG")),
            ("twice.jpg", good),
            ("twice.jpg", good),
            ("apart.jpg", good),
            ("between.jpg", good),
            ("apart.txt", b"far from its picture"),
            ("dots.v1.a.jpg", good),
            ("dots.v1.b.jpg", good),
            ("README", b"hello"),
            (".hidden", b"hello"),
            ("class.jpg", good),
            ("class.cls", b"cat"),
            ("json.jpg", good),
            ("json.json", b"[1, 2"),
        ],
    )
    index = index_shard(url, fields=Fields())
    found = statuses(index)
    twice = [STATUSES[s] for k, s in zip(index.keys, index.columns["status"], strict=True) if k == "twice"]
    assert twice == ["ok", "duplicate_key"]
    apart = [STATUSES[s] for k, s in zip(index.keys, index.columns["status"], strict=True) if k == "apart"]
    assert apart == ["not_adjacent", "not_adjacent"]
    del found["twice"], found["apart"]
    assert found == {
        "good": "ok",
        "lonely": "missing_image",
        "html": "not_image",
        "empty": "not_image",
        "cut": "truncated",
        "header": "truncated",
        "cut_png": "truncated",
        "gif": "unsupported",
        "avif": "unsupported",
        "tiny": "too_small",
        "bomb": "too_large",
        "trailing": "ok",
        "png_inside": "ok",
        "between": "ok",
        "dots": "missing_image",
        "class": "ok",
        "json": "ok",
    }
    assert index.notes == {"bad_json": 1, "bad_label": 1, "no_extension": 2}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_sizes_are_those_after_turning(form: str) -> None:
    headers = [inspect_header(picture(form, (40, 20), orientation=o)) for o in range(1, 9)]
    sizes = [(header.width, header.height) for header in headers if header.status == "ok"]
    assert sizes == [(40, 20)] * 4 + [(20, 40)] * 4


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_formats_the_decoder_reads_are_accepted(form: str) -> None:
    verdict = inspect_header(picture(form, (40, 20)))
    assert (verdict.status, verdict.width, verdict.height) == ("ok", 40, 20)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_judging_never_raises(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"]))
    raw = bytearray(picture(form))
    for _ in range(data.draw(st.integers(0, 6))):
        raw[data.draw(st.integers(0, min(len(raw), 400) - 1))] = data.draw(st.integers(0, 255))
    assert inspect_header(bytes(raw[: data.draw(st.integers(0, len(raw)))])).status in STATUSES


def test_hostile_files_are_judged_without_an_exception(tmp_path: Path, shared_data: Path) -> None:
    files = sorted(path for path in (shared_data / "hostile").iterdir() if path.is_file())
    url = shard(tmp_path / "hostile.tar", [(f"{n:04d}.jpg", path.read_bytes()) for n, path in enumerate(files)])
    index = index_shard(url, fields=Fields(min_side=1))
    assert len(index.keys) == len(files)
    assert index.counts["ok"] > 100
    assert {"unsupported", "not_image", "truncated"} <= set(index.counts)
    found = {path.name: status for path, status in zip(files, statuses(index).values(), strict=True)}
    # Cut JPEG 2000 streams must never reach nvImageCodec 0.9: it dies of them, and the process with it.
    assert found["balloon_eciRGBv2_aware.jp2"] == "truncated"
    assert found["test-card-lossless.jp2"] == "ok"


def test_requirements_exclude_samples(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", [*samples(2), ("9.jpg", picture()), ("9.txt", b"  "), ("9.cls", b"1")])
    assert index_shard(url, fields=Fields(require=("label",))).counts == {"ok": 3}
    assert index_shard(url, fields=Fields(require=("caption",))).counts == {"ok": 2, "missing_caption": 1}
    with pytest.raises(DataError, match="cannot be required"):
        Fields(require=("captions",))


def test_a_second_build_walks_nothing_and_a_changed_shard_is_walked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [shard(tmp_path / f"{n}.tar", samples(3, 10 * n)) for n in range(3)]
    walked: list[str] = []
    import pipeline.data.index.build as module

    real = module.index_shard
    monkeypatch.setattr(module, "index_shard", lambda about, **rest: walked.append(about.url) or real(about, **rest))
    first = build(urls, tmp_path / "index")
    assert walked == urls
    walked.clear()
    assert build(urls, tmp_path / "index") == first
    assert walked == []
    shard(tmp_path / "1.tar", samples(4, 50))
    first.sidecar(2).write_bytes(b"half written")
    second = build(urls, tmp_path / "index", check=True)
    assert walked == urls[1:]
    assert second.fingerprint != first.fingerprint
    assert "changed: 1.tar (3 samples" in first.diff(second)
    assert "0.tar" not in first.diff(second)
    walked.clear()
    build(urls, tmp_path / "index", fields=Fields(min_side=8))
    assert walked == urls


def test_relative_names_are_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = shard(tmp_path / "a.tar", samples(3))
    manifest = build([url], tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    assert build(["a.tar"], "index").shards == manifest.shards


def test_processes_build_the_same_index(tmp_path: Path) -> None:
    urls = [shard(tmp_path / f"{n}.tar", samples(2, 10 * n)) for n in range(4)]
    told: list[tuple[int, int]] = []
    manifest = build(urls, tmp_path / "a", workers=2, progress=lambda done, total, _: told.append((done, total)))
    assert manifest.shards == build(urls, tmp_path / "b", workers=1).shards
    assert told == [(n, 4) for n in range(1, 5)]
    assert not list((tmp_path / "a").glob(".*"))


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    urls = [shard(tmp_path / f"{n}.tar", samples(3, 10 * n)) for n in range(2)]
    first = build(urls, tmp_path / "index")
    moved = tmp_path / "moved"
    moved.mkdir()
    copies = [shutil.copy(url, moved) for url in urls]
    second = build(copies, tmp_path / "index2")
    assert second.fingerprint == first.fingerprint
    assert first.diff(second) == ""
    swapped = build(copies[::-1], tmp_path / "index2")
    assert swapped.fingerprint != first.fingerprint
    assert "another order" in first.diff(swapped)


@pytest.mark.parametrize("extension", ["jpg", "cls", "txt"])
def test_the_fingerprint_changes_with_any_sample(tmp_path: Path, extension: str) -> None:
    members = samples(3)
    before = build([shard(tmp_path / "a.tar", members)], tmp_path / "index").fingerprint
    position = next(n for n, (name, _) in enumerate(members) if name.endswith(extension))
    name, data = members[position]
    members[position] = (name, data[:-3] + b"1" + data[-2:] if len(data) > 3 else b"2")
    assert len(members[position][1]) == len(data)
    assert build([shard(tmp_path / "a.tar", members)], tmp_path / "index").fingerprint != before


def test_all_bad_shards_are_named_at_once(tmp_path: Path) -> None:
    good = shard(tmp_path / "good.tar", samples(3))
    text = tmp_path / "text.tar"
    text.write_bytes(b"hello" * 1000)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(good).read_bytes()[:2000])
    with pytest.raises(DataError) as caught:
        build([good, str(text), str(cut), str(tmp_path / "gone.tar")], tmp_path / "index")
    message = str(caught.value)
    assert all(word in message for word in ("3 of 4 shards", "text.tar", "not a tar archive", "cut.tar", "truncated", "gone.tar"))
    assert not (tmp_path / "index" / "manifest.npz").exists()
    many = [str(tmp_path / f"{n}.tar") for n in range(9)]
    with pytest.raises(DataError, match="and 4 more"):
        build(many, tmp_path / "index")


def test_damaged_shards_can_be_used_up_to_the_cut(tmp_path: Path) -> None:
    whole = Path(shard(tmp_path / "a.tar", samples(5))).read_bytes()
    index = index_shard(str(tmp_path / "a.tar"), fields=Fields())
    third = int(index.columns["caption_offset"][2])
    (tmp_path / "a.tar").write_bytes(whole[: third + 4])
    manifest = build([str(tmp_path / "a.tar")], tmp_path / "index", on_truncated="keep-readable")
    assert manifest.total == 2
    assert manifest.notes == {"cut_sample": 1}
    assert "truncated" in manifest.shards[0].damage
    with pytest.raises(DataError, match="truncated"):
        build([str(tmp_path / "a.tar")], tmp_path / "index")


def test_nothing_usable_is_refused_with_the_counts(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", [("1.txt", b"a"), ("2.jpg", b"b")])
    with pytest.raises(DataError, match="1 missing_image, 1 not_image"):
        build([url], tmp_path / "index")
    with pytest.raises(DataError, match="no samples at all"):
        build([shard(tmp_path / "b.tar", [])], tmp_path / "index")


def test_a_manifest_is_loaded_as_it_was_saved_and_edits_are_noticed(tmp_path: Path) -> None:
    urls = [shard(tmp_path / f"{n}.tar", [*samples(3, 10 * n), ("bad.jpg", b"")]) for n in range(2)]
    manifest = build(urls, tmp_path / "index", fields=Fields(min_side=9))
    loaded = Manifest.load(tmp_path / "index")
    assert loaded == manifest
    assert (loaded.total, loaded.classes, loaded.sizes.tolist()) == (6, 3, [3, 3])
    assert loaded.counts == {"ok": 6, "not_image": 2}
    assert loaded.rows(1).keys == ("0010", "0011", "0012")
    assert loaded.ids().tolist() == [0, 1, 2, 1 << 32, (1 << 32) + 1, (1 << 32) + 2]
    assert loaded.ids(np.array([5, 0, 3])).tolist() == [(1 << 32) + 2, 0, 1 << 32]
    path = tmp_path / "index" / "manifest.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "digest": arrays["digest"][::-1]})
    with pytest.raises(DataError, match="edited"):
        Manifest.load(tmp_path / "index")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="damaged"):
        Manifest.load(tmp_path / "index")
    with pytest.raises(DataError, match="no manifest"):
        Manifest.load(tmp_path)


def test_an_index_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        build([shard(tmp_path / "a.tar", samples(1))], tmp_path / "file" / "index")
