"""TIFF and BigTIFF of any number of pages and samples: strips and tiles, interleaved and planar, both byte orders.

The channels of a file are the samples of its pages, page after page: a page of three samples has three channels, eight pages of
one sample have eight. Smaller copies of a page (overviews, masks) are left out; other pages must be alike.

Every size is checked against the file and against the limits before anything is allocated, and only codecs whose output is
bounded are used: raw, LZW, deflate, PackBits, Zstandard, with horizontal or floating-point prediction.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.formats import orientation
from pipeline.data.formats.channels import MAX_CHANNELS, BadImage, Header

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_COMPRESSIONS = (1, 5, 8, 32773, 32946, 50000)
_PREDICTORS = (1, 2, 3)
_PHOTOMETRIC = (0, 1, 2, 5)  # gray (either way), RGB, separated; a palette's indices or YCbCr are no channels
_PAGES = 4 * MAX_CHANNELS  # pages looked at, overviews included
_SEGMENTS = 1 << 20  # strips or tiles of a page
_TILE = 1 << 22  # values of a tile that are read whatever the limit: a small image may lie in one of the usual size

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what damaged files lack; that is counted instead


def header(data: bytes, limit: int) -> Header:
    """Describes an image.

    Args:
        data: the file.
        limit: largest number of values of an image.

    Raises:
        BadImage: see :func:`pipeline.data.formats.read.inspect`.
        Exception: whatever a damaged file makes tifffile raise.
    """
    with _opened(data, limit) as pages:
        first = pages[0]
        rows, columns = (first.imagelength, first.imagewidth)
        if orientation.swaps(_turn(first)):
            rows, columns = columns, rows
        dtype = first.dtype.newbyteorder("=").name
        return Header("tiff", rows, columns, len(pages) * first.samplesperpixel, dtype)


def decode(data: bytes, limit: int) -> NDArray[Any]:
    """Returns ``[height, width, channels]`` in native byte order; arguments and errors as for :func:`header`."""
    with _opened(data, limit) as pages:
        parts = []
        for page in pages:
            values = np.asarray(page.asarray(maxworkers=1))
            samples, rows, columns = page.samplesperpixel, page.imagelength, page.imagewidth
            if values.size != samples * rows * columns:
                raise BadImage("undecodable")
            if page.planarconfig == 2 and samples > 1:
                values = values.reshape(samples, rows, columns).transpose(1, 2, 0)
            else:
                values = values.reshape(rows, columns, samples)
            parts.append(orientation.turned(values, _turn(page)))
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        return joined.astype(joined.dtype.newbyteorder("="), copy=False)


@contextmanager
def _opened(data: bytes, limit: int) -> Iterator[list[Any]]:
    """The pages that are channels, checked."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = []
        for number, page in enumerate(file.pages):
            if number >= _PAGES:
                raise BadImage("other_channels")
            if _is_channel(page):
                pages.append(page)
        if not pages:
            raise BadImage("not_image")
        if any(_kind(page) != _kind(pages[0]) for page in pages[1:]):
            raise BadImage("unsupported")
        _check(pages[0], pages[0].dtype, len(pages), limit)
        for page in pages:
            _check_segments(page, data, limit)
        yield pages


def _is_channel(page: Any) -> bool:
    subfile = int(getattr(page, "subfiletype", 0) or 0)
    return not subfile & 0b101  # an overview, a mask


def _kind(page: Any) -> tuple[Any, ...]:
    return page.imagelength, page.imagewidth, page.samplesperpixel, str(page.dtype), page.imagedepth, _turn(page)


def _check(page: Any, dtype: Any, pages: int, limit: int) -> None:
    rows, columns, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    if min(rows, columns, samples) < 1:
        raise BadImage("not_image")
    if rows * columns * samples * pages > limit:
        raise BadImage("too_large")
    if page.imagedepth != 1 or page.tiledepth > 1 or dtype is None:
        raise BadImage("unsupported")
    if page.bitspersample not in (8, 16, 32, 64) or dtype.itemsize * 8 != page.bitspersample:
        raise BadImage("unsupported")


def _check_segments(page: Any, data: bytes, limit: int) -> None:
    """Checks how a page is stored: a codec that is bounded, as many segments as its size needs, all of them in the file."""
    if int(page.photometric) not in _PHOTOMETRIC or int(page.compression) not in _COMPRESSIONS:
        raise BadImage("unsupported")
    if int(page.predictor) not in _PREDICTORS or int(page.fillorder) != 1 or page.is_subsampled:
        raise BadImage("unsupported")
    rows, columns, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    planes = samples if page.planarconfig == 2 else 1
    depth = samples // planes
    if page.is_tiled:
        length, width = page.tilelength, page.tilewidth
        # A tile may reach beyond the image, but not be much larger: it is what is allocated, with all of its samples.
        if min(length, width) < 1 or length > 2 * rows + 4096 or width > 2 * columns + 4096:
            raise BadImage("unsupported")
        if length * width * depth > max(limit, _TILE):
            raise BadImage("too_large")
        expected = math.ceil(rows / length) * math.ceil(columns / width) * planes
    else:
        length, width = min(max(page.rowsperstrip, 1), rows), columns
        expected = math.ceil(rows / length) * planes
    offsets, counts = page.dataoffsets, page.databytecounts
    if expected > _SEGMENTS or len(offsets) < expected or len(counts) < expected:
        raise BadImage("truncated" if expected <= _SEGMENTS else "unsupported")
    if any(offset < 8 or count < 1 or offset + count > len(data) for offset, count in zip(offsets, counts, strict=False)):
        raise BadImage("truncated")
    if sum(counts) > len(data) + rows * columns * samples * page.dtype.itemsize:  # segments that share their bytes
        raise BadImage("unsupported")
    if int(page.compression) == 1:
        stored = rows * columns * depth * planes * page.dtype.itemsize
        if sum(counts) < stored:
            raise BadImage("truncated")


def _turn(page: Any) -> int:
    tag = page.tags.get(orientation.TAG)
    return orientation.known(tag.value) if tag is not None else 1
