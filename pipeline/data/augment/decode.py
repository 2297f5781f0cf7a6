"""Decodes images, to RGB or to declared channels; one that cannot be decoded is returned as ``None`` instead of raising.

A decode error inside a DALI pipeline makes the pipeline unusable, so decoding happens before it, with nvImageCodec, the decoder
that DALI uses. It releases the GIL and runs on CPU and GPU. It is used for JPEG, PNG and WebP only: a damaged JPEG 2000 crashes
nvImageCodec 0.9 and the process, and its TIFF decoder multiplies colour by alpha if the image is rotated. Pillow decodes the
other formats, on the CPU.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia import nvimgcodec

from pipeline.data.augment.pillow import by_pillow
from pipeline.data.formats import read
from pipeline.data.formats.channels import Channels
from pipeline.data.index.fields import Fields
from pipeline.data.index.image_header import sniff

_WEBP_EXIF = 0x08


class Decoder:
    """Decodes JPEG, PNG, WebP, TIFF, BMP, PNM and JPEG 2000 to RGB, orientation applied, alpha dropped.

    The orientation is that of EXIF; XMP is ignored. Pass only images that
    :func:`pipeline.data.index.image_header.inspect_header` accepts: the image size is not limited here.

    Args:
        threads: CPU threads.
        device_id: a CUDA device, or ``None`` to decode on the CPU.
    """

    def __init__(self, *, threads: int = 1, device_id: int | None = None) -> None:
        self._device_id = device_id
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if device_id is None else device_id,
            max_num_cpu_threads=min(threads, max(len(os.sched_getaffinity(0)) - 1, 1)),
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)] if device_id is None else None,
            # Smooth chroma upsampling, as in CPU decoders: the GPU's default is nearest neighbour and differs visibly.
            options=":fancy_upsampling=1",
        )
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=True, color_spec=nvimgcodec.ColorSpec.SRGB)

    def decode(self, encoded: list[bytes]) -> list[Any]:
        """Decodes a batch; on a GPU it is launched on the calling thread's current stream, and the host does not wait for it.

        Args:
            encoded: the files' bytes.

        Returns:
            One uint8 ``[height, width, 3]`` array (or device image) each, ``None`` where decoding failed.
        """
        kinds = [_pillows(data) for data in encoded]
        quick = iter(self._quick([data for data, kind in zip(encoded, kinds, strict=True) if kind is None]))
        return [next(quick) if kind is None else self._slow(data, kind) for data, kind in zip(encoded, kinds, strict=True)]

    def blank(self, side: int) -> Any:
        """Returns a uniform gray image, of the type that :meth:`decode` returns."""
        return self._placed(np.full((side, side, 3), 128, dtype=np.uint8))

    def _quick(self, encoded: list[bytes]) -> list[Any]:
        stream = 0 if self._device_id is None else torch.cuda.current_stream(self._device_id).cuda_stream
        images = self._decoder.decode(encoded, params=self._params, cuda_stream=stream) if encoded else []
        usable = [image if image is not None and tuple(image.shape)[-1] == 3 else None for image in images]
        return [np.asarray(image) if image is not None and self._device_id is None else image for image in usable]

    def _slow(self, data: bytes, kind: str) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = by_pillow(data, kind)
        except Exception:  # a malicious file can make a parser raise any exception
            return None
        return self._placed(pixels)

    def _placed(self, pixels: NDArray[np.uint8]) -> Any:
        if self._device_id is None:
            return pixels
        # From pinned memory, which torch reuses only after the copy: a copy from pageable memory would block.
        return torch.tensor(pixels).pin_memory().to(torch.device("cuda", self._device_id), non_blocking=True)


class ChannelDecoder:
    """Decodes images of declared channels on the CPU; the interface of :class:`Decoder`.

    Args:
        channels: what every image must have.
        threads: CPU threads.
        device_id: a CUDA device on which images are placed, or ``None``.
        max_pixels: as for :func:`pipeline.data.formats.read.inspect`.
    """

    def __init__(
        self, channels: Channels, *, threads: int = 1, device_id: int | None = None, max_pixels: int = 50_000_000
    ) -> None:
        self._channels, self._device_id, self._max_pixels = channels, device_id, max_pixels
        self._pool = ThreadPoolExecutor(threads, "fovea-decode") if threads > 1 else None

    def decode(self, encoded: list[bytes]) -> list[Any]:
        """Decodes a batch.

        Args:
            encoded: the files' bytes, see :func:`pipeline.data.formats.read.decode`.

        Returns:
            One float32 ``[height, width, channels]`` array (or tensor on the device) each, with the values as stored, which are
            exact in it; ``None`` where decoding failed or the image differs from the declaration.
        """
        images = list(self._pool.map(self._one, encoded)) if self._pool is not None else [self._one(data) for data in encoded]
        return [None if image is None else self._placed(image) for image in images]

    def blank(self, side: int) -> Any:
        """Returns a uniform image, the middle of the full range for integers and zero for float32."""
        value = 0.0 if self._channels.dtype == "float32" else np.ceil(self._channels.full_range / 2)
        return self._placed(np.full((side, side, self._channels.count), value, dtype=np.float32))

    def _one(self, data: bytes) -> NDArray[np.float32] | None:
        values = read.decode(data, self._channels, max_pixels=self._max_pixels) if data else None
        return None if values is None else values.astype(np.float32, copy=False)

    def _placed(self, pixels: NDArray[np.float32]) -> Any:
        if self._device_id is None:
            return pixels
        return torch.tensor(pixels).pin_memory().to(torch.device("cuda", self._device_id), non_blocking=True)


def decoder_of(fields: Fields, *, threads: int = 1, device_id: int | None = None) -> Decoder | ChannelDecoder:
    """Returns the decoder of a data set's images.

    Args:
        fields: the rules that it was indexed by.
        threads: CPU threads.
        device_id: a CUDA device, or ``None``.

    Raises:
        ConfigError: a library for images of declared channels is not installed.
    """
    if fields.channels is None:
        return Decoder(threads=threads, device_id=device_id)
    read.check_libraries()
    return ChannelDecoder(fields.channels, threads=threads, device_id=device_id, max_pixels=fields.max_pixels)


def _pillows(data: bytes) -> str | None:
    """Returns the format if Pillow must decode it; ``None`` if nvImageCodec does.

    Data that is not an image goes to nvImageCodec too, which returns ``None`` for it. WebP with EXIF: nvImageCodec cannot read
    lossless ones and ignores the orientation if the EXIF block has a prefix.
    """
    kind = sniff(data)
    if kind in ("tiff", "bmp", "pnm", "jpeg2000"):
        return kind
    return kind if kind == "webp" and data[12:16] == b"VP8X" and len(data) > 20 and data[20] & _WEBP_EXIF else None
