"""Encoded bytes to pixels, one bad picture at a time: what cannot be decoded comes back as ``None`` and nothing dies.

A decode error inside a DALI pipeline kills the pipeline for good, so decoding happens before it, with nvImageCodec, the same
decoder DALI is built on. It releases the GIL and runs on CPU and GPU.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from nvidia import nvimgcodec


class Decoder:
    """Decodes JPEG, PNG, WebP, TIFF, BMP, PNM and JPEG 2000 to RGB, orientation applied, alpha dropped.

    A JPEG 2000 file that is cut short brings nvImageCodec 0.9 down with the process; index and reader let none through
    (:func:`pipeline.data.index.whole`).

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
        images = self._decoder.decode(encoded, params=self._params)
        usable = [image if image is not None and tuple(image.shape)[-1] == 3 else None for image in images]
        return [np.asarray(image) if image is not None and self._on_cpu else image for image in usable]

    def blank(self, side: int) -> Any:
        """A uniform gray picture, of the kind that :meth:`decode` returns."""
        picture = np.full((side, side, 3), 128, dtype=np.uint8)
        return picture if self._on_cpu else nvimgcodec.as_image(picture).cuda()
