"""Validates image headers without decoding: format, size, completeness, and whether the decoder supports the image.

This protects the decoder: images that would crash it, need gigabytes or be decoded wrongly are rejected here.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from PIL import (
    BmpImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipeline.data.formats import png
from pipeline.data.formats.orientation import of_exif, swaps

__all__ = ["HeaderInfo", "inspect_header", "is_complete", "open_header", "orientation", "sniff", "too_many_scans"]

_OPENERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "jpeg2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "pnm": PpmImagePlugin.PpmImageFile,
}
_OTHER_IMAGES = (b"GIF8", b"8BPS", b"DDS ", b"qoif", b"\0\0\1\0", b"\0\0\2\0", b"icns", b"\xff\x0a", b"<svg", b"\x76\x2f\x31\1")
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I;16L"}
_MAX_SCANS = 100
_MAX_SCANNED = 1_000_000_000  # pixels times scans: about two seconds
_SIXTEEN_BIT = {"png", "pnm"}  # Pillow opens their 16-bit grayscale as mode I, which elsewhere means 32 bits of unknown range


@dataclass(frozen=True)
class HeaderInfo:
    """Result of validating an image's header.

    Attributes:
        status: ``ok``, ``not_image``, ``unsupported``, ``truncated``, ``too_large`` or ``too_small``.
        format: one of :data:`pipeline.data.index.fields.FORMATS`.
        width: pixels, after EXIF orientation; 0 if unknown.
        height: likewise.
    """

    status: str
    format: str = "none"
    width: int = 0
    height: int = 0


def inspect_header(data: bytes, *, min_side: int = 16, max_pixels: int = 50_000_000) -> HeaderInfo:
    """Validates the bytes of an image without decoding it.

    The format is detected from the content, not from the file's name; only formats that the decoder reads are parsed.
    """
    kind = sniff(data)
    if kind in ("none", "other"):
        return HeaderInfo("unsupported" if kind == "other" else "not_image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size, known = _header(data, kind)
    except Exception:  # a malicious header can make a parser raise any exception
        return HeaderInfo("not_image" if is_complete(data, kind) else "truncated", kind)
    if min(size) <= 0:
        return HeaderInfo("not_image", kind)
    if size[0] * size[1] > max_pixels:
        return HeaderInfo("too_large", kind, *size)
    if min(size) < min_side:
        return HeaderInfo("too_small", kind, *size)
    if not is_complete(data, kind):
        return HeaderInfo("truncated", kind, *size)
    if not known or (kind == "jpeg" and too_many_scans(data, size[0] * size[1])):
        return HeaderInfo("unsupported", kind, *size)
    return HeaderInfo("ok", kind, *size)


def too_many_scans(data: bytes, pixels: int) -> bool:
    """Whether a JPEG has so many scans that decoding would take far longer than its size suggests; real ones have about ten.

    Args:
        data: the file. Within the data of a scan, the marker of the next one cannot occur by chance.
        pixels: width times height; each scan processes all of them.
    """
    first = _jpeg_frame(data)[0]
    scans = data.count(b"\xff\xda", first) + 1 if first else 0
    return scans > _MAX_SCANS or scans * pixels > _MAX_SCANNED


def is_complete(data: bytes, kind: str) -> bool:
    """Whether an image's bytes reach its end marker (takes microseconds; formats without one pass).

    JPEG, JPEG 2000: an end marker after the start of the data, though other bytes may follow it. PNG: chunk by chunk to the last
    one, since a length beyond the end of the file makes the decoder allocate gigabytes.
    WebP: the length in the header.
    """
    if kind == "jpeg":
        scan = _jpeg_frame(data)[0]
        return scan > 0 and data.rfind(b"\xff\xd9", scan) >= 0
    if kind == "png":
        return _png_ends(data)
    if kind == "jpeg2000":  # packets never contain two bytes above FF8F, so this is the end of the codestream
        return data.rfind(b"\xff\xd9", max(data.find(b"\xff\x4f"), 0)) >= 0
    if kind == "webp":
        return len(data) >= 12 and len(data) >= struct.unpack_from("<I", data, 4)[0] + 8
    return True


def _png_ends(data: bytes) -> bool:
    at = 8
    while at + 12 <= len(data):
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return False


def sniff(data: bytes) -> str:
    """Detects the format from a file's first bytes: a supported one, ``other`` for unsupported images, or ``none``."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    if data[:2] == b"BM":
        return "bmp"
    if data[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or data[:4] == b"\xff\x4f\xff\x51":
        return "jpeg2000"
    if len(data) > 2 and data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "pnm"
    return "other" if data.startswith(_OTHER_IMAGES) or data[4:8] == b"ftyp" else "none"


def open_header(data: bytes, kind: str) -> Image.Image:
    """Opens an image of a known format with Pillow, which reads the header but not the pixels.

    Raises:
        Exception: any exception, if the header is broken.
    """
    # Not Image.open: its pixel limit is global state, and it would try other formats.
    return _OPENERS[kind](io.BytesIO(data))


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation 1..8 still to be applied; 1 if there is none, or none that can be read."""
    if image.format == "TIFF":
        return 1  # Pillow applies it itself
    return of_exif(image.info.get("exif") or b"")


def _header(data: bytes, kind: str) -> tuple[tuple[int, int], bool]:
    """Returns width and height as displayed, and whether the decoder supports this pixel type."""
    with open_header(data, kind) as image:
        width, height = image.size
        known = image.mode in _MODES or (image.mode == "I" and kind in _SIXTEEN_BIT)
        if kind == "jpeg":
            _, frame, precision = _jpeg_frame(data)  # baseline, extended or progressive, Huffman coded
            known = known and frame in (0xC0, 0xC1, 0xC2) and precision == 8
        if kind == "jpeg2000":
            known = known and _codestream_size(data) == (width, height) and _codestream_components(data) <= 4
        turn = png.turn(data) if kind == "png" else orientation(image)
        return (height, width) if swaps(turn) else (width, height), known


def _codestream_size(data: bytes) -> tuple[int, int]:
    """Returns width and height from the codestream, which determines the memory, not from the box around it."""
    at = data.find(b"\xff\x4f\xff\x51")
    right, bottom, left, top = struct.unpack_from(">4I", data, at + 8)
    return right - left, bottom - top


def _codestream_components(data: bytes) -> int:
    at = data.find(b"\xff\x4f\xff\x51")
    return int(struct.unpack_from(">H", data, at + 40)[0])


def _jpeg_frame(data: bytes) -> tuple[int, int, int]:
    """Returns the offset of the first scan (0: none), the frame marker and its bits per channel, by parsing the segments."""
    at, frame, precision = 2, 0, 0
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return 0, frame, precision
        marker = data[at + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xDA:
            return at + 2 + length, frame, precision
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 5 <= len(data):
            frame, precision = marker, data[at + 4]
        at += 2 + length
    return 0, frame, precision
