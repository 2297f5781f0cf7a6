"""Unusual, truncated and malicious tar archives: walked to their end within bounds, or refused with a reason."""

from __future__ import annotations

import contextlib
import io
import struct
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import storage
from pipeline.data.index import tar
from pipeline.data.index.build import Fields, index_shard
from pipeline.errors import DataError
from tests.helpers.hostile_images import encode

LONG = "a-directory-with-a-name/" * 6 + "sample-" + "x" * 120 + ".jpg"


def archive() -> bytes:
    """GNU and PAX headers, long names, a link, a directory, sparse members, duplicates, scattered and upper-case members."""
    small = encode("JPEG")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as writer:
        for name in ("0.jpg", LONG, "1.JPG", "dup.jpg", "dup.jpg", "far.jpg", "between.jpg", "far.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = len(small)
            writer.addfile(entry, io.BytesIO(small))
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE), ("sparse.jpg", tarfile.GNUTYPE_SPARSE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "0.jpg"
            writer.addfile(entry)
        writer.format = tarfile.PAX_FORMAT
        for name, headers in (
            ("größe/" + LONG, {}),
            ("pax.jpg", {"comment": "x" * 600}),
            ("holes.jpg", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes.jpg"}),
        ):
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = len(small), headers
            writer.addfile(entry, io.BytesIO(small))
    return buffer.getvalue()


ARCHIVE = archive()
HEADERS = [at for at in range(0, len(ARCHIVE), 512) if ARCHIVE[at + 257 : at + 262] == b"ustar"]


def put(folder: Path, data: bytes) -> str:
    path = folder / "shard.tar"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    storage.forget()
    return str(path)


class Meter:
    """Counts what is read of a shard, and stops a walk that reads far more than there is."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.bytes, self.reads, self._read = size, 0, 0, storage.read
        monkeypatch.setattr(storage, "read", self)

    def __call__(self, url: str, offset: int, length: int) -> bytes:
        self.bytes, self.reads = self.bytes + length, self.reads + 1
        assert 0 <= offset <= offset + length <= self.size, "reads what is not there"
        assert self.bytes <= 4 * self.size + 4096, "reads the same bytes again and again"
        assert self.reads <= self.size // 128 + 8, "walks in circles"
        return self._read(url, offset, length)


def walk_to_the_end(folder: Path, data: bytes) -> tar.TarDamage | None:
    """Walks an archive; whatever it is, the walk ends, within bounds, and says nothing but :class:`TarDamage`."""
    url = put(folder, data)
    with pytest.MonkeyPatch.context() as patch:
        Meter(len(data), patch)
        try:
            for member in tar.walk(url):
                assert 0 <= member.offset <= member.offset + member.size <= len(data)
        except tar.TarDamage as damage:
            assert 0 <= damage.at < len(data) + 512
            return damage
    return None


def signed(data: bytearray, at: int) -> None:
    """Makes the checksum of a header right, so that its other fields are believed."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def test_the_archive_is_read_whole(tmp_path: Path) -> None:
    url = put(tmp_path, ARCHIVE)
    notes = tar.Notes()
    keys = [key for key, _ in tar.samples(url, notes)]
    assert keys == [
        *("0", LONG[:-4], "1", "dup", "dup", "far", "between", "far"),
        *(f"größe/{LONG[:-4]}", "pax"),
    ]
    assert notes == {"link": 1, "sparse": 2}
    index = index_shard(url, fields=Fields())
    assert index.counts == {"ok": 7, "duplicate_key": 1, "not_adjacent": 2}


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_a_tar_cut_at_any_byte_is_never_taken_for_whole(tmp_path: Path, step: int) -> None:
    end = len(ARCHIVE.rstrip(b"\0"))
    complete = -(-end // 512) * 512 + 1024  # the members and the end marker: what follows is padding
    for length in range(0, complete, step):
        damage = walk_to_the_end(tmp_path, ARCHIVE[:length])
        assert damage is not None, length
        assert damage.reason == ("empty_file" if length == 0 else "not_tar" if length < 512 else "truncated"), length
    assert walk_to_the_end(tmp_path, ARCHIVE[:complete]) is None


def test_a_cut_tar_gives_the_samples_before_the_cut_if_asked_to(tmp_path: Path) -> None:
    keys = index_shard(put(tmp_path, ARCHIVE), fields=Fields()).keys
    for length in range(512, len(ARCHIVE) - 12_000, 997):
        url = put(tmp_path, ARCHIVE[:length])
        with pytest.raises(DataError):
            index_shard(url, fields=Fields())
        index = index_shard(url, fields=Fields(), on_truncated="keep-readable")
        assert index.keys == keys[: len(index.keys)]
        assert index.damage


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (124, b"\xff" * 12),  # base 256: -1
        (124, b"\xff" * 8 + struct.pack(">i", -1024)),  # back to where the walk came from
        (124, b"\x80" + b"\x7f" * 11),  # larger than any file
        (124, b"-0000000512\0"),
        (124, b"77777777777\0"),
    ],
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S", b"V"])
def test_a_size_that_cannot_be_is_damage(tmp_path: Path, offset: int, value: bytes, kind: bytes) -> None:
    data = bytearray(ARCHIVE)
    at = HEADERS[1]
    data[at + offset : at + offset + len(value)] = value
    data[at + 156 : at + 157] = kind
    signed(data, at)
    assert walk_to_the_end(tmp_path, bytes(data)) is not None


@pytest.mark.parametrize("size", ["9" * 5000, "²", "٣", "-1", "1e3", "", " 7", "9" * 19])
def test_a_pax_size_that_is_no_number_is_damage(tmp_path: Path, size: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as writer:
        entry = tarfile.TarInfo("0.jpg")
        entry.pax_headers = {"size": size}
        writer.addfile(entry)
    damage = walk_to_the_end(tmp_path, buffer.getvalue())
    assert damage is not None
    assert len(str(damage)) < 600


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_done_to_a_tar_its_walk_ends_and_is_told_apart(tmp_path: Path, data: st.DataObject) -> None:
    changed = bytearray(ARCHIVE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(HEADERS) if data.draw(st.booleans()) else st.integers(0, len(changed) - 1))
        at = min(at, len(changed) - 1)
        match data.draw(st.sampled_from(["byte", "field", "cut out", "put in", "end", "double"])):
            case "byte":
                changed[at] = data.draw(st.integers(0, 255))
            case "field" if at + 512 <= len(changed):
                field, length = data.draw(st.sampled_from([(0, 100), (124, 12), (156, 1), (257, 8), (345, 155), (482, 1)]))
                value = data.draw(st.binary(min_size=1, max_size=length))
                changed[at + field : at + field + len(value)] = value
                signed(changed, at)
            case "cut out":
                del changed[at : at + data.draw(st.sampled_from([1, 7, 512, 1024, 1500]))]
            case "put in":
                changed[at:at] = data.draw(st.sampled_from([b"\0", bytes(512), bytes(1024), b"noise" * 103, ARCHIVE[:512]]))
            case "end":
                del changed[at:]
            case "double":
                changed += ARCHIVE[at : at + 2048]
        if not changed:
            break
    walk_to_the_end(tmp_path, bytes(changed))
    with contextlib.suppress(DataError):
        index_shard(
            put(tmp_path, bytes(changed)), fields=Fields(), on_truncated=data.draw(st.sampled_from(["error", "keep-readable"]))
        )
