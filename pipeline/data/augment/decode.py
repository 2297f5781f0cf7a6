"""Encoded bytes to pixels, one bad picture at a time: what cannot be decoded comes back as ``None`` and nothing dies.

A decode error inside a DALI pipeline kills the pipeline for good, so decoding happens before it, with nvImageCodec, the same
decoder DALI is built on. It releases the GIL and runs on CPU and GPU. It is trusted with JPEG, PNG and WebP only: a damaged
JPEG 2000 brings nvImageCodec 0.9 down with the process, and its TIFF multiplies colour by alpha once the picture is turned.
Pillow decodes the rest, on the CPU.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia import nvimgcodec
from PIL import Image

from pipeline.data.index.image_header import open_header, orientation, sniff

_ROWS = 256  # of a 16-bit picture converted at once
_WEBP_EXIF = 0x08
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoder:
    """Decodes JPEG, PNG, WebP, TIFF, BMP, PNM and JPEG 2000 to RGB, orientation applied, alpha dropped.

    Orientation is that of EXIF; what XMP says about it is not heeded. Give it only what
    :func:`pipeline.data.index.image_header.inspect_header` accepts: a picture's size is not limited here.

    Args:
        threads: CPU threads.
        device_id: a CUDA device, or ``None`` to decode on the CPU.
    """

    def __init__(self, *, threads: int = 1, device_id: int | None = None) -> None:
        self._on_cpu = device_id is None
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if device_id is None else device_id,
            max_num_cpu_threads=min(threads, max(len(os.sched_getaffinity(0)) - 1, 1)),
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)] if device_id is None else None,
            # Smooth chroma, as the CPU decoders do: the GPU's default is nearest and differs visibly.
            options=":fancy_upsampling=1",
        )
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=True, color_spec=nvimgcodec.ColorSpec.SRGB)

    def decode(self, encoded: list[bytes]) -> list[Any]:
        """Decode a batch.

        Args:
            encoded: the files' bytes.

        Returns:
            One uint8 ``[height, width, 3]`` array (or device image) each, ``None`` for what cannot be decoded.
        """
        kinds = [_pillows(data) for data in encoded]
        quick = iter(self._quick([data for data, kind in zip(encoded, kinds, strict=True) if kind is None]))
        return [next(quick) if kind is None else self._slow(data, kind) for data, kind in zip(encoded, kinds, strict=True)]

    def blank(self, side: int) -> Any:
        """A uniform gray picture, of the kind that :meth:`decode` returns."""
        return self._placed(np.full((side, side, 3), 128, dtype=np.uint8))

    def _quick(self, encoded: list[bytes]) -> list[Any]:
        images = self._decoder.decode(encoded, params=self._params) if encoded else []
        usable = [image if image is not None and tuple(image.shape)[-1] == 3 else None for image in images]
        return [np.asarray(image) if image is not None and self._on_cpu else image for image in usable]

    def _slow(self, data: bytes, kind: str) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = _by_pillow(data, kind)
        except Exception:  # a hostile file can make a parser raise anything at all
            return None
        return self._placed(pixels)

    def _placed(self, pixels: NDArray[np.uint8]) -> Any:
        return pixels if self._on_cpu else nvimgcodec.as_image(pixels).cuda()


def _pillows(data: bytes) -> str | None:
    """The format, if Pillow is to decode it; nvImageCodec takes the others, and gives ``None`` for what is no picture.

    WebP with EXIF: nvImageCodec reads the lossless ones not at all and overlooks the orientation where the block has a prefix.
    """
    kind = sniff(data)
    if kind in ("tiff", "bmp", "pnm", "jpeg2000"):
        return kind
    return kind if kind == "webp" and data[12:16] == b"VP8X" and len(data) > 20 and data[20] & _WEBP_EXIF else None


def _by_pillow(data: bytes, kind: str) -> NDArray[np.uint8]:
    with open_header(data, kind) as image:
        image.load()
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips
            values = np.asarray(image)
            gray = np.empty(values.shape, dtype=np.uint8)
            for row in range(0, len(values), _ROWS):  # the whole picture as wider integers would take its size many times
                part = values[row : row + _ROWS].astype(np.int32)
                gray[row : row + _ROWS] = ((part + 128) // 257).clip(0, 255)
            return np.repeat(gray[:, :, None], 3, axis=2)
        turn = _TURNS.get(orientation(image))
        upright = image if turn is None else image.transpose(turn)
        return np.asarray(upright.convert("RGB"))
