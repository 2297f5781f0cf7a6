"""Whether an optimizer step was applied."""

from __future__ import annotations

import torch
from torch import Tensor


class Applied:
    """Whether a step was applied, as a bool that the host may not know yet.

    A GPU works on a step long after the host has queued it. Reading the decision at once would make the host wait, and then the
    GPU for the host; so it is copied to the host in the background and read when it is needed, a step later.

    Args:
        flag: bool scalar, on the device.
        delayed: whether the host reads it later.

    Attributes:
        on_device: the flag, if the host does not know it yet: what follows must then take effect only where it is true.
    """

    def __init__(self, flag: Tensor, *, delayed: bool) -> None:
        self.on_device = flag if delayed else None
        self._ready: torch.cuda.Event | None = None
        if delayed and flag.is_cuda:
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(flag, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._host = flag if delayed else flag.cpu()

    def __bool__(self) -> bool:
        if self._ready is not None and not self._ready.query():
            self._ready.synchronize()
        return bool(self._host)
