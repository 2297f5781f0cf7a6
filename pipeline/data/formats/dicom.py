"""DICOM with pydicom: uncompressed or run-length encoded images; frames and samples are channels."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.formats.channels import BadImage, Channels, Header
from pipeline.errors import ConfigError

_RAW = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_RLE = "1.2.840.10008.1.2.5"
_PREAMBLE = bytes(128) + b"DICM"
_META_GROUP, _SYNTAX = b"\x02\x00", b"\x10\x00"  # the group of elements before the data set; the one that names its syntax
_WIDE = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")  # lengths of four bytes
_NARROW = tuple(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())  # of two
_META = 1 << 16  # bytes in which these elements must end


def sniffed(data: bytes) -> bool:
    """Whether a file has DICOM's preamble."""
    return data[128:132] == b"DICM"


def header(data: bytes, channels: Channels, limit: int) -> Header:
    """Describes an image; its type is the declared one if the values can be given in it exactly.

    Raises:
        BadImage: see :func:`pipeline.data.formats.read.inspect`.
        Exception: whatever a damaged file makes pydicom raise.
    """
    return _described(_read(data), channels, limit)


def _described(dataset: Any, channels: Channels, limit: int) -> Header:
    if "PixelData" not in dataset:
        raise BadImage("not_image")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    samples, frames = int(dataset.get("SamplesPerPixel", 1)), int(dataset.get("NumberOfFrames", 1) or 1)
    if min(rows, columns, samples, frames) < 1:
        raise BadImage("not_image")
    if rows * columns * samples * frames > limit:
        raise BadImage("too_large")
    bits, signed = int(dataset.BitsAllocated), int(dataset.get("PixelRepresentation", 0)) == 1
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    photometric = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if bits not in (8, 16) or syntax not in (*_RAW, _RLE) or photometric not in ("MONOCHROME1", "MONOCHROME2", "RGB"):
        raise BadImage("unsupported")
    stored = math.ceil(rows * columns * samples * frames * bits / 8)
    if syntax in _RAW and len(dataset.PixelData) < stored:
        raise BadImage("truncated")
    own = f"{'int' if signed else 'uint'}{bits}"
    dtype = channels.dtype if channels.dicom == "window" or channels.dtype == "float32" else own
    return Header("dicom", rows, columns, samples * frames, dtype)


def decode(data: bytes, channels: Channels, limit: int) -> NDArray[Any]:
    """Returns ``[height, width, channels]``: stored values, rescaled values (float32), or the first window.

    Raises:
        BadImage: see :func:`pipeline.data.formats.read.inspect`; ``undecodable`` without a window where one is asked for.
        Exception: whatever a damaged file makes pydicom raise.
    """
    dataset = _read(data)
    about = _described(dataset, channels, limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = np.asarray(dataset.pixel_array)
    samples, frames = int(dataset.get("SamplesPerPixel", 1)), int(dataset.get("NumberOfFrames", 1) or 1)
    values = values.reshape(frames, about.height, about.width, samples).transpose(1, 2, 0, 3)
    values = values.reshape(about.height, about.width, about.count)
    if channels.dicom == "full" and channels.dtype != "float32":
        return values.astype(channels.dtype) if values.dtype.name != channels.dtype else values
    scaled = values * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    if channels.dicom == "full":
        return scaled.astype(np.float32)
    center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if center is None or width is None or not width > 0:
        raise BadImage("undecodable")
    shown = np.clip((scaled - (center - width / 2)) / width, 0, 1)
    if str(dataset.get("PhotometricInterpretation", "")) == "MONOCHROME1":
        shown = 1 - shown
    full = channels.full_range
    return (np.rint(shown * full) if channels.dtype != "float32" else shown).astype(channels.dtype)


def _read(data: bytes) -> Any:
    try:
        import pydicom
    except ImportError:
        raise ConfigError(
            "pydicom is not installed, and there are DICOM files",
            where="data.channels",
            hint="Install it: pip install 'fovea[dicom]'",
        ) from None
    # Looked up before pydicom parses the file: it would inflate a deflated one without a limit.
    if _syntax(data) not in (*_RAW, _RLE):
        raise BadImage("unsupported")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pydicom.dcmread(io.BytesIO(data))


def _first(value: Any) -> float | None:
    if value is None:
        return None
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)


def _syntax(data: bytes) -> str:
    """The transfer syntax that the group of meta elements names; empty unless that is certain.

    The elements are walked one by one, because the value of one can look like another. Whatever pydicom may read in another way
    (types of values that it does not know, lengths that are left open, the same element twice) makes the syntax uncertain.
    """
    names, at = [], len(_PREAMBLE)
    while data[at : at + 2] == _META_GROUP:
        kind = data[at + 4 : at + 6]
        begin = at + (12 if kind in _WIDE else 8)
        end = begin + int.from_bytes(data[begin - (4 if kind in _WIDE else 2) : begin], "little")
        if kind not in _WIDE + _NARROW or end > min(len(data), _META):
            return ""
        if data[at + 2 : at + 4] == _SYNTAX:
            if kind != b"UI":
                return ""
            names.append(data[begin:end].rstrip(b"\0 ").decode("ascii", "replace"))
        at = end
    return names[0] if len(names) == 1 else ""
