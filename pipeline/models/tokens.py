"""Output tokens of vision towers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The output tokens of a vision tower, after its final norm.

    Attributes:
        cls: ``[batch, width]``, the class token.
        registers: ``[batch, registers, width]``; empty without registers.
        patches: ``[batch, patches, width]`` in row-major order of the grid (of the kept ones, if tokens were dropped); or
            ``[n, width]``, if only some patches of the batch were requested.
        kept: int64 ``[batch, patches]``, positions of ``patches`` in the full grid; ``None`` means all of them.
        attention: ``[batch, patches]``, attention of the class token in the last block; ``None`` unless requested.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    kept: Tensor | None = None
    attention: Tensor | None = None


def taken(patches: Tensor, index: Tensor) -> Tensor:
    """Gathers patches ``[batch, n, width]`` from ``[batch, patches, width]`` at the positions ``[batch, n]``."""
    return patches.gather(1, index[:, :, None].expand(-1, -1, patches.shape[2]))


def any_size(x: Tensor, *dims: int) -> Tensor:
    """Marks dimensions whose size varies from step to step: a compiled block that gets ``x`` serves all sizes with one graph."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(x, dim)
    return x
