"""Copies batches to a CUDA device on a stream of their own, so that neither loading nor training waits for the other.

The thread that prepares batches launches everything on this stream: decoding, augmentation and copies. The thread that trains
makes its own stream wait for an event behind them, which the host does not wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.augment.views import Batch


class DeviceCopies:
    """Copies arrays to a device; on a CPU they stay where they are.

    Args:
        device: where batches go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device.index or 0) if device.type == "cuda" else None

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Context of the thread that prepares batches: its CUDA device and stream, which a new thread does not inherit."""
        if self._stream is None:
            yield
            return
        torch.cuda.set_device(self._stream.device)
        with torch.cuda.stream(self._stream):
            yield

    def to_device(self, data: NDArray[Any] | Tensor) -> Tensor:
        """An array or tensor on the device; the host does not wait for the copy.

        Copies start from pinned memory, which torch reuses only after they have ended; one from pageable memory would block.
        """
        tensor = data if isinstance(data, Tensor) else torch.from_numpy(data)
        if self._stream is None or tensor.is_cuda:
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def ready(self) -> torch.cuda.Event | None:
        """An event behind all copies so far; ``None`` on a CPU."""
        return self._stream.record_event() if self._stream is not None else None

    def receive(self, batches: Sequence[Batch], ready: torch.cuda.Event | None) -> None:
        """Makes the calling thread's current stream wait for the copies, and keeps their memory until that stream has used it.

        Args:
            batches: batches from :meth:`to_device`.
            ready: the event behind them.
        """
        if ready is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(ready)
        for tensor in {t.untyped_storage().data_ptr(): t for batch in batches for t in batch.tensors()}.values():
            if tensor.numel():
                tensor.record_stream(current)


@cache
def _stream(index: int) -> torch.cuda.Stream:
    """One stream for each device: torch has only 32, and evaluations open many batch streams. 0 is the lowest priority."""
    return torch.cuda.Stream(torch.device("cuda", index), priority=0)
