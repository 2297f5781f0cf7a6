"""Transcodes images that the decoder does not support, and downscales large ones, with Pillow."""

from __future__ import annotations

import io
import re
import warnings
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.index.image_header import too_many_scans

_INNER_PNG = re.compile(rb"\x89PNG\r\n\x1a\n....IHDR(....)(....)", re.DOTALL)
_INNER_JP2 = re.compile(rb"\xff\x4f\xff\x51....(....)(....)", re.DOTALL)
Form = Literal["jpg", "png"]
FORMS: tuple[Form, ...] = ("jpg", "png")
_FORMATS = (
    *("JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM", "HEIF"),
    *("TGA", "ICO", "ICNS", "PSD", "DDS", "PCX", "SGI", "QOI", "DIB"),
)


def transcode(data: bytes, form: Form, *, max_pixels: int = 50_000_000, max_side: int | None = None) -> bytes | None:
    """Returns the first frame of an image as 8-bit RGB, orientation applied, alpha dropped, like the decoder.

    Args:
        data: an image of any format that Pillow reads.
        form: ``jpg`` (quality 95, no chroma subsampling) or ``png`` (lossless).
        max_pixels: larger images, by their header, are not decoded.
        max_side: downscale so that the longer side has at most this many pixels.

    Returns:
        The new file, or None if Pillow cannot read the image or its values have no natural range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if _inner_pixels(data) > max_pixels:
                return None
            with Image.open(io.BytesIO(data), formats=_readable()) as image:
                pixels = image.width * image.height
                if pixels > max_pixels or (image.format in ("JPEG", "MPO") and too_many_scans(data, pixels)):
                    return None
                converted = _eight_bits(ImageOps.exif_transpose(image))
    except Exception:  # a malicious file can make a parser raise any exception
        return None
    if converted is None:
        return None
    if max_side is not None and max(converted.size) > max_side:
        scale = max_side / max(converted.size)
        size = max(round(converted.width * scale), 1), max(round(converted.height * scale), 1)
        converted = converted.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if form == "jpg":
        converted.save(out, "JPEG", quality=95, subsampling=0)
    else:
        converted.save(out, "PNG")
    return out.getvalue()


def _inner_pixels(data: bytes) -> int:
    """Returns the pixels of the largest PNG or JPEG 2000 inside an icon, whose own directory is not trusted."""
    if not data.startswith((b"\0\0\1\0", b"\0\0\2\0", b"icns")):
        return 0
    sizes = [(int.from_bytes(m[1], "big"), int.from_bytes(m[2], "big")) for m in _INNER_PNG.finditer(data)]
    sizes += [(int.from_bytes(m[1], "big"), int.from_bytes(m[2], "big")) for m in _INNER_JP2.finditer(data)]
    return max((width * height for width, height in sizes), default=0)


def _readable() -> list[str]:
    """Returns Pillow's plain image formats: some of its others start programs (EPS) or are not images."""
    Image.init()
    return [form for form in _FORMATS if form in Image.OPEN]


def _eight_bits(image: Image.Image) -> Image.Image | None:
    """Converts to RGB; 16-bit values are scaled, which Pillow's own conversion would clip."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        return None
    return image.convert("RGB")
