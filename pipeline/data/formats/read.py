"""Inspects and decodes images of declared channels. A file that differs from the declaration is refused, never padded.

An image of several files (``Channels.members``) is the part of its shard that holds them, headers included: a short tar, from the
header of its first member to the end of its last. One read and one checksum are then enough for it, as for any other image.
"""

from __future__ import annotations

import importlib.util
import io
import tarfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.formats import dicom, npy, png, tiff
from pipeline.data.formats.channels import BadImage, Channels, Header
from pipeline.errors import ConfigError

LIBRARIES = ("tifffile", "imagecodecs")
_BLOCK = 512
_RGB = 3  # channels of the images that max_pixels is meant for


@dataclass(frozen=True)
class Inspected:
    """Result of inspecting a header.

    Attributes:
        status: ``ok``, or a status of the index.
        kind: format, ``none`` if unknown.
        width, height: pixels; 0 if unknown.
    """

    status: str
    kind: str = "none"
    width: int = 0
    height: int = 0


def sniff(data: bytes) -> str:
    """Detects the format from a file's first bytes; ``none`` if it is not one of this package's."""
    if data[:4] in tiff.MAGICS:
        return "tiff"
    if data.startswith(png.MAGIC):
        return "png"
    if data.startswith(npy.MAGIC):
        return "npy"
    return "dicom" if dicom.sniffed(data) else "none"


def largest(max_pixels: int) -> int:
    """Largest number of values of an image: that of an RGB image of ``max_pixels``."""
    return _RGB * max_pixels


def inspect(data: bytes, channels: Channels, *, min_side: int, max_pixels: int) -> Inspected:
    """Validates one file's header; the file holds all channels.

    Args:
        data: the file.
        channels: what it must have.
        min_side: minimum side, pixels.
        max_pixels: maximum area of an image of three channels, pixels; one of more channels may have fewer pixels.

    Returns:
        With status ``not_image``, ``unsupported`` (a palette, a codec, a number of bits), ``truncated``, ``too_large``,
        ``too_small``, ``other_channels`` or ``other_dtype`` where it cannot be used.
    """
    return _checked(data, channels, channels.count, min_side, max_pixels)[0]


def inspect_stack(members: Mapping[str, bytes], channels: Channels, *, min_side: int, max_pixels: int) -> Inspected:
    """Validates the headers of the files of one image; see :func:`inspect`, and ``other_size`` for sides that differ.

    Args:
        members: their bytes by extension.
        channels, min_side, max_pixels: as for :func:`inspect`.
    """
    count, sizes = 0, set()
    for name in channels.members:
        if name not in members:
            return Inspected("missing_image", "stack")
        result, header = _checked(members[name], channels, None, min_side, max_pixels)
        if result.status != "ok" or header is None:
            return Inspected(result.status, "stack", result.width, result.height)
        count += header.count
        sizes.add((header.width, header.height))
    width, height = sizes.pop()
    if sizes:
        return Inspected("other_size", "stack", width, height)
    if count != channels.count:
        return Inspected("other_channels", "stack", width, height)
    if width * height * count > largest(max_pixels):
        return Inspected("too_large", "stack", width, height)
    return Inspected("ok", "stack", width, height)


def _checked(
    data: bytes, channels: Channels, count: int | None, min_side: int, max_pixels: int
) -> tuple[Inspected, Header | None]:
    kind = sniff(data)
    if kind == "none":
        return Inspected("not_image"), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = _header(data, kind, channels, largest(max_pixels))
    except BadImage as error:
        return Inspected(str(error), kind), None
    except ConfigError:
        raise
    except Exception:  # a malicious header can make a parser raise any exception
        return Inspected("not_image", kind), None
    size = (kind, header.width, header.height)
    if min(header.width, header.height) < 1:
        return Inspected("not_image", kind), None
    if header.width * header.height * header.count > largest(max_pixels):
        return Inspected("too_large", *size), header
    if min(header.width, header.height) < min_side:
        return Inspected("too_small", *size), header
    if count is not None and header.count != count:
        return Inspected("other_channels", *size), header
    if header.dtype != channels.dtype:
        return Inspected("other_dtype", *size), header
    return Inspected("ok", *size), header


def decode(data: bytes, channels: Channels, *, max_pixels: int = 50_000_000) -> NDArray[Any] | None:
    """Decodes an image, of one file or of several (a short tar).

    Args:
        data: its bytes, as :class:`pipeline.data.loader.reader.Record` holds them.
        channels: what it must have.
        max_pixels: as for :func:`inspect`.

    Returns:
        Values as stored, ``[height, width, channels]`` of the declared type in native byte order, contiguous; ``None`` if the
        bytes cannot be decoded, differ from the declaration or hold values that are not finite.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if channels.members:
                parts = members_of(data, channels)
                values = np.concatenate([_values(parts[name], channels, max_pixels) for name in channels.members], axis=2)
            else:
                values = _values(data, channels, max_pixels)
    except ConfigError:  # a library is missing
        raise
    except Exception:  # a malicious file can make a parser raise any exception
        return None
    if values.shape[2] != channels.count or values.dtype.name != channels.dtype:
        return None
    if values.dtype.kind == "f" and not bool(np.isfinite(values).all()):
        return None
    return np.ascontiguousarray(values)


def members_of(data: bytes, channels: Channels) -> dict[str, bytes]:
    """The files of an image by extension, from the part of the shard that holds them.

    Raises:
        BadImage: one is missing or incomplete.
        Exception: whatever a damaged header makes tarfile raise.
    """
    parts: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * _BLOCK)), mode="r:") as archive:
        for member in archive:
            _, _, extension = member.name.rpartition("/")[2].partition(".")
            if not member.isreg() or member.issparse() or extension.lower() not in channels.members:
                continue
            end = member.offset_data + member.size
            if end > len(data):
                raise BadImage("truncated")
            parts[extension.lower()] = data[member.offset_data : end]
    if len(parts) < len(channels.members):
        raise BadImage("truncated")
    return parts


def _header(data: bytes, kind: str, channels: Channels, limit: int) -> Header:
    if kind == "tiff":
        return tiff.header(data, limit)
    if kind == "png":
        return png.header(data)
    return npy.header(data, channels) if kind == "npy" else dicom.header(data, channels, limit)


def _values(data: bytes, channels: Channels, max_pixels: int) -> NDArray[Any]:
    kind = sniff(data)
    if kind == "none":
        raise BadImage("not_image")
    limit = largest(max_pixels)
    header = _header(data, kind, channels, limit)
    if header.width * header.height * header.count > limit or header.dtype != channels.dtype:
        raise BadImage("undecodable")
    if kind == "tiff":
        return tiff.decode(data, limit)
    if kind == "png":
        return png.decode(data)
    return npy.decode(data, channels) if kind == "npy" else dicom.decode(data, channels, limit)


def check_libraries() -> None:
    """Refuses to begin without the libraries that read TIFF and PNG; pydicom is asked for with the first DICOM file.

    Raises:
        ConfigError: with the command that installs them.
    """
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"{name} is not installed", where="data.channels", hint="Install it: pip install 'fovea[scientific]'"
            )
