"""Reads npz files of one-dimensional arrays, as ``numpy.savez`` writes them, without trusting their headers.

``numpy.load`` allocates the memory that a header claims; here allocations are limited by the size of the file. Large files are
mapped instead of read: processes of a node share the memory, and only the pages that are used are loaded.
"""

from __future__ import annotations

import mmap
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from pipeline.untrusted import open_regular

_HEADER = 4096  # maximum size of an array's header, bytes


def read_arrays(path: Path, types: Mapping[str, DTypeLike]) -> dict[str, NDArray[Any]]:
    """Returns the arrays, one-dimensional.

    Args:
        path: a regular file.
        types: names and types of the required arrays; others are ignored.

    Raises:
        ValueError: an array is missing, of another type or shape, compressed, or the file is damaged.
        DataError: it is not a regular file.
        OSError: it cannot be opened.
    """
    with open(open_regular(path), "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return {name: _array(archive, f"{name}.npy", np.dtype(dtype)) for name, dtype in types.items()}
        except (KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError, SyntaxError) as error:
            raise ValueError(str(error) or type(error).__name__) from None


def _array(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    about = _stored(archive, name)
    with archive.open(about) as member:
        _length(member, name, dtype, about.file_size)
        return np.frombuffer(member.read(), dtype=dtype).copy()


def map_arrays(path: Path, types: Mapping[str, DTypeLike]) -> dict[str, NDArray[Any]]:
    """Maps the arrays of a file that is never changed, only replaced.

    Args:
        path: a regular file.
        types: names and types of the required arrays; others are ignored.

    Returns:
        Read-only arrays, one-dimensional.

    Raises:
        ValueError: an array is missing, of another type or shape, compressed, or the file is damaged.
        DataError: it is not a regular file.
        OSError: it cannot be opened.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise ValueError("the file is empty")
        content = np.frombuffer(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ), dtype=np.uint8)
        try:
            with zipfile.ZipFile(file) as archive:
                return {name: _mapped(archive, f"{name}.npy", np.dtype(dtype), content) for name, dtype in types.items()}
        except (KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError, SyntaxError) as error:
            raise ValueError(str(error) or type(error).__name__) from None


def _mapped(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], content: NDArray[np.uint8]) -> NDArray[Any]:
    about = _stored(archive, name)
    with archive.open(about) as member:  # validates the local header
        count = _length(member, name, dtype, about.file_size)
        skipped = about.file_size - count * dtype.itemsize
    local = about.header_offset
    first = local + 30 + int.from_bytes(content[local + 26 : local + 28].tobytes(), "little")
    first += int.from_bytes(content[local + 28 : local + 30].tobytes(), "little") + skipped
    data = content[first : first + count * dtype.itemsize]
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"{name} lies outside the file")
    return data.view(dtype)


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    about = archive.getinfo(name)
    if about.compress_type != zipfile.ZIP_STORED or about.file_size != about.compress_size:
        raise ValueError(f"{name} is compressed")
    return about


def _length(member: IO[bytes], name: str, dtype: np.dtype[Any], size: int) -> int:
    """Number of elements after the header of an array, whose file has ``size`` bytes."""
    version = npy.read_magic(member)
    if version != (1, 0):
        raise ValueError(f"{name} has an unsupported version")
    shape, _, kind = npy.read_array_header_1_0(member, max_header_size=_HEADER)
    if kind != dtype or len(shape) != 1 or member.tell() + shape[0] * dtype.itemsize != size:
        raise ValueError(f"{name} has an unexpected type or length")
    return int(shape[0])


def check_columns(columns: Mapping[str, NDArray[Any]], samples: int, size: int, tables: Mapping[str, int]) -> None:
    """Validates the columns of a shard's index: equal lengths, values in range, every member inside the shard.

    Args:
        columns: by name, see :class:`pipeline.data.index.sidecar.ShardIndex`.
        samples: length of each.
        size: bytes of the shard.
        tables: for columns of indices into a table, the number of its entries.

    Raises:
        ValueError: a column is invalid.
    """
    if any(len(column) != samples for column in columns.values()):
        raise ValueError("columns are of unequal length")
    if not samples:
        return
    for name, entries in tables.items():
        if int(columns[name].max()) >= entries:
            raise ValueError(f"a value of {name} is invalid")
    for part in ("image", "caption", "segmentation"):
        offset, length = columns[f"{part}_offset"], columns[f"{part}_size"]
        if min(int(offset.min()), int(length.min())) < 0 or int(length.max()) > size or bool((offset > size - length).any()):
            raise ValueError(f"{part} lies outside the shard")
    if min(int(columns["width"].min()), int(columns["height"].min())) < 0:
        raise ValueError("width or height is negative")
