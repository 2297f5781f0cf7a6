"""Image files that are unusual, that claim to be huge, or that are damaged, made with Pillow."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter


def blob_image(mode: str = "RGB", width: int = 64, height: int = 40) -> Image.Image:
    """Blurred noise, with an alpha channel where the mode has one."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    soft = np.stack([np.asarray(Image.fromarray(noise[..., c]).filter(ImageFilter.GaussianBlur(2))) for c in range(4)], axis=-1)
    image = Image.fromarray(((soft.astype(np.float32) - soft.min()) * 255 / np.ptp(soft)).astype(np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert("RGB").convert(mode) if mode in ("P", "1", "YCbCr", "LAB") else image.convert(mode)


def encode(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    blob_image(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int, *, prefix: bytes = b"") -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return prefix + block.tobytes().removeprefix(b"Exif\0\0")


def animated(kind: str) -> bytes:
    return encode(kind, save_all=True, append_images=[blob_image().rotate(180)])


@cache
def unusual_images() -> dict[str, bytes]:
    """Complete images in every encoding that a collection from the web may contain."""
    files = {
        "cmyk.jpg": encode("JPEG", "CMYK"),
        "gray.jpg": encode("JPEG", "L"),
        "progressive.jpg": encode("JPEG", progressive=True),
        "rgb-coded.jpg": encode("JPEG", keep_rgb=True),
        "4-1-1.jpg": encode("JPEG", subsampling="4:1:1"),
        "restarts.jpg": encode("JPEG", restart_marker_rows=1),
        "trailing.jpg": encode("JPEG") + b"bytes after the end" * 99,
        "png inside.jpg": encode("PNG"),
        "animated.webp": animated("WEBP"),
        "animated.png": animated("PNG"),
        "pages.tif": animated("TIFF"),
        "lossless.webp": encode("WEBP", lossless=True),
        "alpha.webp": encode("WEBP", "RGBA"),
        "16 bit.jp2": encode("JPEG2000", "I;16"),
        "bare.j2k": encode("JPEG2000", no_jp2=True),
        "adam7.png": encode("PNG", optimize=True),
    }
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        files[f"{mode}.png"] = encode("PNG", mode)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        files[f"{mode}.bmp"] = encode("BMP", mode)
    for mode in ("1", "L", "RGB", "I;16"):
        files[f"{mode}.ppm"] = encode("PPM", mode)
    for mode, compression in itertools.product(("1", "L", "LA", "P", "RGBA", "CMYK", "LAB", "I;16"), ("raw", "tiff_lzw")):
        files[f"{mode} {compression}.tif"] = encode("TIFF", mode, compression=compression)
    for turn in range(1, 9):
        files[f"turned {turn}.jpg"] = encode("JPEG", exif=exif(turn, prefix=b"Exif\0\0"))
        files[f"turned {turn}.png"] = encode("PNG", exif=exif(turn))
        files[f"turned {turn}.tif"] = encode("TIFF", "RGBA", tiffinfo={0x0112: turn})
        for name, options in (("lossy", {}), ("lossless", {"lossless": True})):
            files[f"turned {turn} {name}.webp"] = encode("WEBP", exif=exif(turn), **options)
        with_prefix = encode("WEBP", "RGBA", exif=exif(turn))  # Pillow strips the prefix, other writers leave it
        at = with_prefix.index(b"EXIF")
        block = b"Exif\0\0" + with_prefix[at + 8 :]
        longer = with_prefix[:at] + b"EXIF" + struct.pack("<I", len(block)) + block
        files[f"turned {turn} prefixed.webp"] = longer[:4] + struct.pack("<I", len(longer) - 8) + longer[8:]
    return files


def chunk_checked(data: bytearray) -> bytes:
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def decompression_bombs() -> dict[str, bytes]:
    """Small files whose headers claim 30 000 by 30 000 pixels, and more."""
    side = 30_000
    files = {}
    data = bytearray(encode("PNG"))
    data[16:24] = struct.pack(">II", side, side)
    files["png"] = chunk_checked(data)
    for name, kind in (("jpeg", encode("JPEG")), ("progressive jpeg", encode("JPEG", progressive=True))):
        data = bytearray(kind)
        at = data.index(b"\xff\xc2" if "progressive" in name else b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", side, side)
        files[name] = bytes(data)
    data = bytearray(encode("BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    files["bmp"] = bytes(data)
    data = bytearray(encode("TIFF"))
    entries = struct.unpack_from("<I", data, 4)[0] + 2
    for number in range(2):  # width and length are the first two tags
        struct.pack_into("<HII", data, entries + 12 * number + 2, 4, 1, side)
    files["tiff"] = bytes(data)
    files["pnm"] = b"P6\n30000 30000\n255\n" + bytes(99)
    data = bytearray(encode("JPEG2000", no_jp2=True))
    data[8:16] = struct.pack(">II", side, side)
    files["jpeg2000"] = bytes(data)
    data = bytearray(encode("WEBP", "RGBA"))
    data[24:30] = (16_383).to_bytes(3, "little") * 2
    files["webp"] = bytes(data)
    return files


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """A few bytes changed, cut out or put in, mostly near the beginning, where the headers are."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 6)):
        end = len(changed) if random.random() < 0.4 else min(200, len(changed))
        at, kind = int(random.integers(0, max(end, 1))), random.integers(0, 5)
        if kind == 0:
            del changed[at : at + int(random.integers(1, 20))]
        elif kind == 1:
            changed[at:at] = random.bytes(int(random.integers(1, 20)))
        elif at < len(changed):
            changed[at] = int(random.choice([0, 1, 127, 128, 255, random.integers(256)]))
    return bytes(changed[: random.integers(len(changed) + 1)] if random.random() < 0.1 else changed)


def read_hostile_files(shared_data: Path) -> dict[str, bytes]:
    """The collection of hostile image files, by name."""
    return {path.name: path.read_bytes() for path in sorted((shared_data / "hostile").iterdir())}
