"""Small files that would take minutes or gigabytes: refused before anything is decoded; indexes whose numbers lie."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import storage
from pipeline.data.augment.pillow import by_pillow
from pipeline.data.index.build import Fields, build
from pipeline.data.index.image_header import inspect_header
from pipeline.data.index.manifest import Manifest
from pipeline.data.index.shard_table import _ARRAYS, Shard, ShardTable
from pipeline.data.index.sidecar import ShardIndex, load_sidecar
from pipeline.data.pack.transcode import transcode
from pipeline.errors import DataError
from tests.checkpoint.test_manifest import JSON


def progressive(side: int, scans: int, *, restarts: bool = False) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.zeros((side, side, 3), np.uint8))
    image.save(buffer, "JPEG", progressive=True, quality=30, **({"restart_marker_rows": 1} if restarts else {}))
    data = buffer.getvalue()
    begin, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:begin] + data[begin:end] * scans + data[end:]


@pytest.mark.parametrize(("side", "scans", "status"), [(64, 20, "ok"), (64, 120, "unsupported"), (2000, 400, "unsupported")])
@pytest.mark.parametrize("restarts", [False, True])
def test_scans_without_end_are_refused(side: int, scans: int, status: str, restarts: bool) -> None:
    data = progressive(side, scans, restarts=restarts)
    assert inspect_header(data).status == status
    assert (transcode(data, "jpg") is not None) == (status == "ok")


def test_scans_are_counted_with_their_pixels() -> None:
    data = progressive(6000, 30)
    assert inspect_header(data).status == "unsupported" and inspect_header(progressive(6000, 1)).status == "ok"


def test_a_thumbnail_counts_for_nothing() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(buffer, "JPEG", exif=b"Exif\0\0" + b"\xff\xda" * 500)
    assert inspect_header(buffer.getvalue()).status == "ok"


@pytest.mark.parametrize("head", [b"\0\0\1\0", b"\0\0\2\0"])
def test_an_icon_with_a_huge_picture_inside_takes_no_memory(head: bytes) -> None:
    buffer = io.BytesIO()
    Image.new("L", (9000, 9000)).save(buffer, "PNG")
    png = buffer.getvalue()
    icon = head + struct.pack("<H", 1) + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(png), 22) + png
    tracemalloc.start()
    assert transcode(icon, "jpg") is None
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_an_ordinary_icon_is_written_anew() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (48, 48), (200, 10, 10, 255)).save(buffer, "ICO")
    assert transcode(buffer.getvalue(), "png") is not None


def test_sixteen_bits_are_narrowed_in_little_memory() -> None:
    values = np.arange(2000 * 2000, dtype=np.uint32).reshape(2000, 2000).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", compression="tiff_deflate")
    tracemalloc.start()
    pixels = by_pillow(buffer.getvalue(), "tiff")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(pixels[..., 0], ((values.astype(np.int64) + 128) // 257).clip(0, 255))
    assert peak < 12 * values.size, f"{peak / values.size:.1f} bytes a pixel"


def test_a_codestream_with_more_channels_than_its_box_says_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG2000")
    data = bytearray(buffer.getvalue())
    at = data.find(b"\xff\x4f\xff\x51")
    struct.pack_into(">H", data, at + 40, 16384)
    assert inspect_header(buffer.getvalue()).status == "ok" and inspect_header(bytes(data)).status != "ok"


def test_a_width_beyond_the_index_is_no_error(tmp_path: Path) -> None:
    entries = [(256, 4, 0xFFFFFFFF), (257, 4, 0xFFFFFFFF), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (279, 4, 8)]
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    tiff += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)
    good = io.BytesIO()
    Image.new("RGB", (32, 32)).save(good, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("a.tif", tiff), ("b.png", good.getvalue())):
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    manifest = build([str(tmp_path / "x.tar")], tmp_path / "index")
    assert manifest.total == 1 and sum(manifest.counts.values()) == 2


# ---- indexes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build(storage.expand(shards), tmp_path_factory.mktemp("index"), fields=Fields())


def sidecar(index: Manifest) -> tuple[Path, dict[str, Any]]:
    path = index.sidecar(0)
    with np.load(path) as file:
        return path, dict(file)


def changed(index: Manifest, target: Path, **arrays: Any) -> Path:
    np.savez(target, **{**sidecar(index)[1], **arrays})
    return target


@pytest.mark.parametrize(
    "name", ["image_size", "image_offset", "caption_size", "segmentation_offset", "width", "status", "format"]
)
@pytest.mark.parametrize("value", [2**63 - 1, -1, 10**9])
def test_columns_whose_numbers_lie_are_refused(index: Manifest, tmp_path: Path, name: str, value: int) -> None:
    column = sidecar(index)[1][name].copy()
    limits = np.iinfo(column.dtype)
    column[0] = min(max(value, limits.min), limits.max)
    if name == "width" and value > 0:
        return
    if column.dtype == np.uint8 and value < 0:
        return
    with pytest.raises(DataError, match="damaged"):
        load_sidecar(changed(index, tmp_path / "x.npz", **{name: column}))


def test_headers_that_ask_for_more_than_the_file_has_take_no_memory(index: Manifest, tmp_path: Path) -> None:
    path, _ = sidecar(index)
    for shape in ("(1152921504606846976,)", "(4294967296,)", "(-1,)", "(2, 2)", "()", "x" * 100):
        target = tmp_path / "x.npz"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
            for info in old.infolist():
                data = old.read(info)
                if info.filename == "image_size.npy":
                    head = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(118) + b"\n"
                    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data[128:]
                new.writestr(info.filename, data)
        tracemalloc.start()
        with pytest.raises(DataError, match="damaged"):
            load_sidecar(target)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
        tracemalloc.stop()


def test_a_compressed_or_pickled_sidecar_is_refused(index: Manifest, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "c.npz", **sidecar(index)[1])
    changed(index, tmp_path / "p.npz", keys=np.array([object()], dtype=object))
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    for name in ("c", "p", "zero"):
        with pytest.raises(DataError):
            load_sidecar(tmp_path / f"{name}.npz")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["format", "url", "size", "tag", "fields", "damage", "notes", "examples", None]), value=JSON)
def test_any_value_in_a_sidecar_is_refused_or_usable(index: Manifest, tmp_path: Path, key: str | None, value: Any) -> None:
    meta = json.loads(sidecar(index)[1]["meta"].tobytes())
    text = json.dumps(value if key is None else {**meta, key: value}).encode()
    target = changed(index, tmp_path / "x.npz", meta=np.frombuffer(text, dtype=np.uint8))
    try:
        found = load_sidecar(target)
    except DataError:
        return
    assert isinstance(found, ShardIndex) and Shard.of(found).samples >= 0 and found.digest


def old_document(index: Manifest) -> dict[str, Any]:
    """The ``manifest.json`` that an earlier version wrote."""
    shards = [asdict(shard) | {"sidecar": f"{shard.name}-0123456789ab.npz"} for shard in index.shards]
    return {"format": 3, "fingerprint": index.fingerprint, "fields": asdict(index.fields), "shards": shards}


def test_a_manifest_of_an_earlier_version_has_the_same_summaries(index: Manifest, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(old_document(index)))
    old = Manifest.load(tmp_path)
    assert (old.fingerprint, old.total, old.counts) == (index.fingerprint, index.total, index.counts)
    assert old.diff(index) == ""


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["format", "fingerprint", "fields", "shards", None]),
    part=st.sampled_from(["url", "size", "samples", "classes", "digest", "sidecar", "counts", "notes", "damage", "tag"]),
    value=JSON,
)
def test_any_value_in_an_old_manifest_is_refused_or_usable(
    index: Manifest, tmp_path: Path, key: str | None, part: str, value: Any
) -> None:
    document = old_document(index)
    wrong = {**document, "shards": [{**document["shards"][0], part: value}]}
    for bad in (value if key is None else {**document, key: value}, wrong):
        (tmp_path / "manifest.json").write_text(json.dumps(bad))
        try:
            found = Manifest.load(tmp_path)
        except DataError:
            continue
        assert found.total >= 0 and found.fingerprint


def table(index: Manifest) -> dict[str, Any]:
    with np.load(Path(index.directory) / "manifest.npz") as file:
        return dict(file)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["format", "fingerprint", "checksum", "fields", "rules", "parent", "up", None]), value=JSON)
def test_any_document_of_a_manifest_is_refused_or_usable(index: Manifest, tmp_path: Path, key: str | None, value: Any) -> None:
    arrays = table(index)
    text = json.dumps(value if key is None else {**json.loads(arrays["meta"].tobytes()), key: value}).encode()
    np.savez(tmp_path / "manifest.npz", **{**arrays, "meta": np.frombuffer(text, dtype=np.uint8)})
    usable_or_refused(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(_ARRAYS)))
def test_any_array_of_a_manifest_is_refused_or_usable(index: Manifest, tmp_path: Path, data: st.DataObject, name: str) -> None:
    arrays = table(index)
    limits = np.iinfo(_ARRAYS[name])
    length = data.draw(st.sampled_from([0, 1, len(arrays[name]), len(arrays[name]) + 1]))
    values = data.draw(st.lists(st.integers(int(limits.min), int(limits.max)), min_size=length, max_size=length))
    arrays[name] = np.array(values, dtype=_ARRAYS[name])
    meta = json.loads(arrays.pop("meta").tobytes())
    meta["checksum"] = ShardTable(arrays, Fields()).checksum  # whoever forges a table can do that too
    np.savez(tmp_path / "manifest.npz", **arrays, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8))
    usable_or_refused(tmp_path)


def usable_or_refused(folder: Path) -> None:
    try:
        found = Manifest.load(folder)
        shards = list(found.shards)
    except DataError:
        return
    assert found.total >= 0 and found.counts is not None and isinstance(found.fingerprint, str)
    for number, shard in enumerate(shards):
        assert found.sidecar(number).resolve().parent.parent.name == "sidecars" and shard.samples >= 0


@pytest.mark.parametrize("name", ["../x.npz", "/etc/passwd"])
def test_names_of_shards_cannot_name_files_elsewhere(index: Manifest, tmp_path: Path, name: str) -> None:
    shard = replace(index.shards[0], url=f"s3://bucket/a/{name}", tag="../../..")
    manifest = replace(index, shards=ShardTable.of([shard], Fields()), directory=str(tmp_path), sidecars="").save(tmp_path)
    assert manifest.sidecar(0).resolve().parent.parent == tmp_path / "sidecars"
