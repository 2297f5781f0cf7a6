"""Decodes images with Pillow alone: what nvImageCodec cannot decode, and everything where it is not installed."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.index.image_header import open_header, orientation, sniff

_ROWS = 256  # rows of a 16-bit image converted at once
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes) -> NDArray[np.uint8] | None:
    """Decodes an image to RGB, orientation applied, alpha dropped.

    Pass only images that :func:`pipeline.data.index.image_header.inspect_header` accepts: the size is not limited here.

    Returns:
        uint8 ``[height, width, 3]``, or ``None`` if the bytes cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return by_pillow(data, sniff(data))
    except Exception:  # a malicious file can make a parser raise any exception
        return None


def by_pillow(data: bytes, kind: str) -> NDArray[np.uint8]:
    """Decodes an image of a known format; raises whatever Pillow raises.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    with open_header(data, kind) as image:
        image.load()
        turn = _TURNS.get(orientation(image))
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips
            values = np.asarray(image if turn is None else image.transpose(turn))
            gray = np.empty(values.shape, dtype=np.uint8)
            for row in range(0, len(values), _ROWS):  # wider integers for the whole image would need a multiple of its memory
                part = values[row : row + _ROWS].astype(np.int32)
                gray[row : row + _ROWS] = ((part + 128) // 257).clip(0, 255)
            return np.repeat(gray[:, :, None], 3, axis=2)
        upright = image if turn is None else image.transpose(turn)
        return np.asarray(upright.convert("RGB"))
