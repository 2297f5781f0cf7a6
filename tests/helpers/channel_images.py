"""Images of several channels as files of every kind, and shards of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray

Layout = Literal["pages", "interleaved", "planar"]
Array = NDArray[Any]


def random_image(dtype: str, count: int, height: int = 24, width: int = 30, seed: int = 0) -> Array:
    """Values over the full range of the type, ``[height, width, count]``; every value of a float differs."""
    random = np.random.default_rng(seed)
    if dtype == "float32":
        return random.normal(size=(height, width, count)).astype(np.float32) * 1e3
    return random.integers(0, np.iinfo(dtype).max, (height, width, count), endpoint=True, dtype=dtype)


def tiff_file(image: Array, layout: Layout = "pages", **options: Any) -> bytes:
    buffer = io.BytesIO()
    first = np.ascontiguousarray(np.moveaxis(image, 2, 0))
    options = {"photometric": "minisblack", **options}
    if layout == "pages":
        tifffile.imwrite(buffer, first, **options)
    elif layout == "interleaved":
        tifffile.imwrite(buffer, image, planarconfig="contig" if image.shape[2] > 1 else None, **options)
    else:
        tifffile.imwrite(buffer, first, planarconfig="separate" if image.shape[2] > 1 else None, **options)
    return buffer.getvalue()


def npy_file(image: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> str:
    """A shard of samples, each a key with its members by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)
