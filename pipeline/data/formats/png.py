"""PNG with 8 or 16 bits per channel, gray or colour, with or without alpha, which is a channel like the others.

The orientation of the EXIF block (chunk ``eXIf``) is applied, as to 8-bit RGB.

The chunk ``IHDR`` says how much memory an image takes; libpng (of imagecodecs) does not read beyond.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.formats import orientation
from pipeline.data.formats.channels import BadImage, Header

MAGIC = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type; 3 is a palette, whose indices are no intensities


def header(data: bytes) -> Header:
    """Describes an image, as displayed.

    Raises:
        BadImage: see :func:`pipeline.data.formats.read.inspect`.
    """
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise BadImage("truncated" if len(data) < 33 else "not_image")
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if not _ends(data):
        raise BadImage("truncated")
    if colour not in _CHANNELS or bits not in (8, 16):
        raise BadImage("unsupported")
    if orientation.swaps(turn(data)):
        height, width = width, height
    return Header("png", height, width, _CHANNELS[colour], "uint16" if bits == 16 else "uint8")


def decode(data: bytes) -> NDArray[Any]:
    """Returns ``[height, width, channels]``, uint8 or uint16, without gamma or colour conversion.

    Raises:
        BadImage: the image has another shape than its header says.
        Exception: whatever libpng's errors become.
    """
    from imagecodecs import png_decode

    about = header(data)
    values: NDArray[Any] = np.asarray(png_decode(_plain(data)))
    values = orientation.turned(values[:, :, None] if values.ndim == 2 else values, turn(data))
    if values.shape != (about.height, about.width, about.count) or values.dtype.name != about.dtype:
        raise BadImage("undecodable")
    return values


def turn(data: bytes) -> int:
    """The orientation of the first EXIF block, which may follow the pixels; a file has at most one."""
    for kind, begin, end in _chunks(data):
        if kind == b"eXIf":
            return orientation.of_exif(data[begin + 8 : end - 4])
    return 1


def _ends(data: bytes) -> bool:
    return any(kind == b"IEND" for kind, _, _ in _chunks(data))


def _chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """Type, begin and end of each complete chunk, up to the last."""
    chunks, at = [], len(MAGIC)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            break
        chunks.append((data[at + 4 : at + 8], at, end))
        if data[at + 4 : at + 8] == b"IEND":
            break
        at = end
    return chunks


def _plain(data: bytes) -> bytes:
    """The file with its pixels alone: other chunks, such as a transparent colour or a gamma, would change values or channels."""
    kept = [data[begin:end] for kind, begin, end in _chunks(data) if kind in (b"IHDR", b"IDAT", b"IEND")]
    return MAGIC + b"".join(kept)
