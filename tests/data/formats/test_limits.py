"""Files of a few hundred kilobytes that ask for gigabytes: refused before anything of that size is allocated."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile

from pipeline.data.formats import dicom, read
from pipeline.data.formats.channels import Channels

LIMITS = {"min_side": 1, "max_pixels": 100_000}
DEFLATED, PLAIN = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1"


@pytest.mark.parametrize(("side", "status"), [(1024, "ok"), (4112, "too_large")])
def test_a_tile_counts_all_of_its_samples(side: int, status: str) -> None:
    """The pixels of a tile are allocated with all of their samples, however few of them are in the image."""
    buffer, image = io.BytesIO(), np.arange(16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)
    tifffile.imwrite(buffer, image, tile=(side, side), planarconfig="contig", compression="zlib", photometric="minisblack")
    channels = Channels(3, "float32")
    assert read.inspect(buffer.getvalue(), channels, **LIMITS).status == status
    decoded = read.decode(buffer.getvalue(), channels, max_pixels=LIMITS["max_pixels"])
    assert np.array_equal(decoded, image) if status == "ok" else decoded is None


def element(number: int, kind: bytes, value: bytes) -> bytes:
    """A meta element in explicit little endian."""
    value += bytes(len(value) % 2)
    length = struct.pack("<HI", 0, len(value)) if kind in dicom._WIDE else struct.pack("<H", len(value))
    return struct.pack("<HH2s", 2, number, kind) + length + value


def named(uid: bytes, kind: bytes = b"UI") -> bytes:
    return element(0x10, kind, uid)


HIDDEN = {
    "in the value of another": element(1, b"OB", named(PLAIN)) + named(DEFLATED),
    "twice": named(PLAIN) + named(DEFLATED),
    "behind an open length": named(PLAIN) + struct.pack("<HH2sHI", 2, 0x102, b"OB", 0, 0xFFFFFFFF) + named(DEFLATED),
    "behind an unknown type": named(PLAIN) + element(0x12, b"ZZ", b"xx") + named(DEFLATED),
    "of another type": named(PLAIN, b"OB"),
    "far behind": named(PLAIN) + element(0x102, b"OB", bytes(1 << 17)) + named(DEFLATED),
    "beyond the end": struct.pack("<HH2sH", 2, 0x10, b"UI", 2000) + PLAIN,
}


@pytest.mark.parametrize("where", sorted(HIDDEN))
def test_a_deflated_dicom_that_names_another_syntax_too_is_not_inflated(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def inflate(*_: object) -> bytes:
        raise AssertionError("it was inflated")

    monkeypatch.setattr(zlib, "decompress", inflate)
    data = bytes(128) + b"DICM" + HIDDEN[where] + zlib.compress(bytes(1 << 20))[2:]
    assert read.inspect(data, Channels(1, "uint16"), **LIMITS).status == "unsupported"
    assert read.decode(data, Channels(1, "uint16")) is None


def test_the_syntax_is_found_among_the_meta_elements() -> None:
    group = element(0, b"UL", bytes(4)) + element(1, b"OB", b"\0\1") + element(2, b"UI", b"1.2") + named(PLAIN)
    assert (
        dicom._syntax(bytes(128) + b"DICM" + group + element(0, b"US", b"\0\0").replace(b"\2\0", b"\x28\0", 1)) == PLAIN.decode()
    )
