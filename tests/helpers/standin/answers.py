"""What the host asks a device and no kernel has computed: answered the same each time, with the wait that the question costs."""

from __future__ import annotations

from typing import Any

import torch

_LIBRARY: list[Any] = []  # keeps the replaced operators alive


def install() -> None:
    """Makes every element of a mask count as true, so that ``x[mask]`` has the shape of all rows."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("nonzero", _nonzero, "CUDA")
    _LIBRARY.append(library)
    copied = torch.Tensor.cpu

    def cpu(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        copy = copied(tensor, *arguments, **options)
        return copy.fill_(True) if tensor.is_cuda and copy.dtype == torch.bool else copy

    torch.Tensor.cpu = cpu  # type: ignore[method-assign]


def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    torch.empty(1, device=mask.device).item()  # the number of elements, which the host waits for
    return torch.empty(mask.numel(), mask.dim(), dtype=torch.int64, device=mask.device)
