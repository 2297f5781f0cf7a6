"""Verification decodes everything, blames the right sample even for a crash, goes on where it stopped, and can exclude."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.index.build import build
from pipeline.data.index.manifest import Manifest
from pipeline.data.inspect import verify as module
from pipeline.data.inspect.verify import Failure, exclude, verify
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.errors import DataError


def picture(seed: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def damaged_png() -> bytes:
    """The header and the end are in order, the pixels between them are not."""
    data = bytearray(picture(0, "PNG"))
    at = data.index(b"IDAT") + 4
    length = struct.unpack(">I", data[at - 8 : at - 4])[0]
    data[at : at + length] = bytes(length)
    data[at + length : at + length + 4] = struct.pack(">I", zlib.crc32(bytes(data[at - 4 : at + length])))
    return bytes(data)


class Fragile:
    """Dies of pictures that hold a certain word; gives every other one the size that the tests' pictures have."""

    def decode(self, encoded: list[bytes]) -> list[Any]:
        if any(b"DIE" in data for data in encoded):
            os._exit(11)
        return [np.zeros((20, 24, 3), np.uint8) for _ in encoded]


class Unstartable:
    """A decoder that cannot be made."""

    def __init__(self) -> None:
        os._exit(12)

    def decode(self, encoded: list[bytes]) -> list[Any]:
        return []


def shards(folder: Path, *contents: list[bytes]) -> Manifest:
    written = []
    for number, pictures in enumerate(contents):
        with ShardWriter(folder / "shards", f"x{number}") as writer:
            for n, data in enumerate(pictures):
                writer.write({"__key__": f"{number}_{n}", "jpg": data})
        written += writer.shards
    return build(written, folder / "index")


def test_sound_pictures_pass_and_leave_no_trace(tmp_path: Path) -> None:
    manifest = shards(tmp_path, [picture(n) for n in range(3)], [picture(n) for n in range(3, 5)])
    told: list[tuple[int, int, str]] = []
    verdict = verify(manifest, workers=1, progress=lambda *words: told.append(words))
    assert (verdict.checked, verdict.failures, verdict.reasons) == (5, (), {})
    assert [(done, total) for done, total, _ in told] == [(3, 5), (5, 5)]
    assert told[0][2] == "x0-00000.tar: 3 samples, 0 failed"
    assert not (tmp_path / "index" / "verify.jsonl").exists()


def test_each_failure_is_named_and_nothing_else(tmp_path: Path) -> None:
    good = [picture(n) for n in range(4)]
    manifest = shards(tmp_path, [good[0], damaged_png(), good[1]], [good[2], good[3]])
    assert manifest.counts == {"ok": 5}, "the index must not see what only a decode can show"
    column = manifest.column(1, "image_offset")
    shard = Path(manifest.shards[1].url)
    data = bytearray(shard.read_bytes())
    data[int(column[1]) + 200] ^= 0xFF
    stamp = shard.stat()
    shard.write_bytes(data)
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    verdict = verify(manifest, workers=1)
    assert verdict.failures == (Failure(0, 1, "undecodable"), Failure(1, 1, "corrupt"))
    assert verdict.checked == 5


@pytest.mark.slow
def test_a_picture_that_kills_the_decoder_is_found_among_its_neighbours(tmp_path: Path) -> None:
    first = [picture(n) + (b"DIE" if n in (3, 4) else b"") for n in range(7)]
    manifest = shards(tmp_path, first, [picture(n) for n in range(6)])
    verdict = verify(manifest, workers=2, decoder=Fragile)
    assert verdict.failures == (Failure(0, 3, "crashes_decoder"), Failure(0, 4, "crashes_decoder"))
    assert verdict.checked == 13


def test_a_decoder_that_never_starts_is_no_fault_of_the_samples(tmp_path: Path) -> None:
    manifest = shards(tmp_path, [picture(0)])
    with pytest.raises(DataError, match="no decoder process can be started"):
        verify(manifest, workers=1, decoder=Unstartable)


def test_a_stopped_verification_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = shards(tmp_path, [picture(0), damaged_png()], [picture(1)], [picture(2)])
    seen: list[int] = []

    def stop(done: int, total: int, line: str) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(manifest, workers=1, progress=stop)
    notebook = tmp_path / "index" / "verify.jsonl"
    with notebook.open("a") as file:
        file.write("[2, 0,")  # a line cut by a kill
    checked: list[int] = []
    verdict = verify(manifest, workers=1, progress=lambda done, total, line: checked.append(done))
    assert (verdict.checked, verdict.resumed, checked) == (4, 3, [4])
    assert verdict.failures == (Failure(0, 1, "undecodable"),)
    assert not notebook.exists()


def test_notes_on_other_data_are_not_believed(tmp_path: Path) -> None:
    manifest = shards(tmp_path, [picture(0)])
    notebook = tmp_path / "index" / "verify.jsonl"
    header = json.dumps({"fingerprint": "of other data", "chunk": module.CHUNK})
    notebook.write_text(f"{header}\n[0, 0, 1, []]\n")
    assert verify(manifest, workers=1, decoder=Fragile).resumed == 0


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[0, 0, 1]",
        "[0, 0, 1, 3]",
        '["a", 0, 1, []]',
        "[0, 0, 1, [[0]]]",
        "[0, 0, 2, []]",
        "[9, 0, 1, []]",
        "[0, 99999999999999999999968, 99999999999999999999969, []]",
        "[" * 5000 + "]" * 5000,
        "nonsense",
    ],
)
def test_notes_that_verification_did_not_write_are_not_believed(tmp_path: Path, line: str) -> None:
    manifest = shards(tmp_path, [picture(0)])
    header = json.dumps({"fingerprint": manifest.fingerprint, "chunk": module.CHUNK})
    (tmp_path / "index" / "verify.jsonl").write_text(f"{header}\n[0, 0, 1, []]\n{line}\n")
    assert verify(manifest, workers=1, decoder=Fragile).resumed == 0


def test_excluded_samples_are_gone_for_good_and_change_the_fingerprint(tmp_path: Path) -> None:
    manifest = shards(tmp_path, [picture(0), damaged_png(), picture(1)], [picture(2), picture(3)])
    failures = (Failure(0, 1, "undecodable"), Failure(1, 0, "corrupt"))
    changed = exclude(manifest, failures)
    assert changed.counts == {"ok": 3, "undecodable": 2} and changed.fingerprint != manifest.fingerprint
    again = build([shard.url for shard in manifest.shards], tmp_path / "index")
    assert again.fingerprint == changed.fingerprint == Manifest.load(tmp_path / "index").fingerprint
    assert [again.rows(n).keys for n in range(2)] == [("0_0", "0_2"), ("1_1",)]
    assert verify(again, workers=1).failures == ()


def test_two_verifications_of_one_index_do_not_mix(tmp_path: Path) -> None:
    manifest = shards(tmp_path, [picture(0)])
    with module.Record(tmp_path / "index", "x", manifest.sizes), pytest.raises(DataError, match="another verification"):
        verify(manifest, workers=1)


def test_parts_are_verified_apart_and_joined_without_checking_again(tmp_path: Path) -> None:
    manifest = shards(tmp_path, [picture(0), damaged_png()], [picture(1)], [damaged_png(), picture(2)])
    first = verify(manifest, workers=1, part=(1, 2))
    assert (first.checked, first.failures) == (4, (Failure(0, 1, "undecodable"), Failure(2, 0, "undecodable")))
    again = verify(manifest, workers=1, part=(1, 2))
    assert (again.checked, again.resumed, again.failures) == (4, 4, first.failures)
    with (
        module.Record(tmp_path / "index", manifest.fingerprint, manifest.sizes, (1, 2)),
        pytest.raises(DataError, match="00001-of-00002"),
    ):
        verify(manifest, workers=1)
    whole = verify(manifest, workers=1)
    assert (whole.checked, whole.resumed, whole.failures) == (5, 4, first.failures)
    assert not list((tmp_path / "index").glob("verify*"))


class Upright:
    """Gives every picture the sides the other way round, like a decoder that leaves the orientation alone."""

    def decode(self, encoded: list[bytes]) -> list[Any]:
        return [np.zeros((24, 20, 3), np.uint8) for _ in encoded]


def test_pixels_of_another_size_than_the_index_says_are_a_failure(tmp_path: Path) -> None:
    manifest = shards(tmp_path, [picture(n) for n in range(2)])
    assert verify(manifest, workers=1, decoder=Upright).reasons == {"wrong_size": 2}
