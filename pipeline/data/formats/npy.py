"""NumPy arrays (``.npy``), without pickles: the size that a header claims must be that of the file."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline.data.formats.channels import BadImage, Channels, Header

MAGIC = b"\x93NUMPY"
_HEADER = 4096  # maximum size of the header, bytes


def header(data: bytes, channels: Channels) -> Header:
    """Describes an array ``[height, width]``, ``[height, width, channels]`` or ``[channels, height, width]``.

    The last of them is assumed only where the last axis has another length than the number of channels and the first has it.

    Raises:
        BadImage: see :func:`pipeline.data.formats.read.inspect`.
    """
    shape, _, dtype, _ = _parsed(data)
    height, width, count = _ordered(shape, channels)[0]
    return Header("npy", height, width, count, dtype.name)


def decode(data: bytes, channels: Channels) -> NDArray[Any]:
    """Returns the array as ``[height, width, channels]`` in native byte order.

    Raises:
        BadImage: see :func:`pipeline.data.formats.read.inspect`.
    """
    shape, fortran, dtype, start = _parsed(data)
    _, first = _ordered(shape, channels)
    values: NDArray[Any] = np.frombuffer(data, dtype=dtype, offset=start)
    values = values.reshape(shape, order="F" if fortran else "C")
    if len(shape) == 2:
        values = values[:, :, None]
    elif first:
        values = values.transpose(1, 2, 0)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _parsed(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    file = io.BytesIO(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise BadImage("unsupported")
        if len(data) > 12 and int.from_bytes(data[8 : 10 if version == (1, 0) else 12], "little") > _HEADER:
            raise BadImage("not_image")
        shape, fortran, dtype = read(file, max_header_size=_HEADER)
    if dtype.hasobject or dtype.fields is not None or dtype.subdtype is not None or len(shape) not in (2, 3) or min(shape) < 0:
        raise BadImage("unsupported")
    start = file.tell()
    claimed = start + math.prod(shape) * dtype.itemsize
    if claimed != len(data):
        raise BadImage("truncated" if claimed > len(data) else "unsupported")
    return tuple(int(n) for n in shape), bool(fortran), dtype, start


def _ordered(shape: tuple[int, ...], channels: Channels) -> tuple[tuple[int, int, int], bool]:
    """Height, width and channels; and whether the channels are the first axis."""
    if len(shape) == 2:
        return (shape[0], shape[1], 1), False
    first = shape[2] != channels.count and shape[0] == channels.count
    return (shape[1], shape[2], shape[0]) if first else (shape[0], shape[1], shape[2]), first
