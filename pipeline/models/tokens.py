"""What every vision tower returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """The tokens of one tower, after its final normalisation.

    Attributes:
        cls: ``[batch, width]``, one token for the whole image.
        registers: ``[batch, registers, width]``; zero registers give an empty tensor.
        patches: ``[batch, patches, width]`` in row-major order of the grid (of the kept ones, if tokens were dropped); or
            ``[n, width]``, if only some of the whole batch were asked for.
        kept: int64 ``[batch, patches]``, positions of ``patches`` in the full grid; ``None`` means all of them.
        attention: ``[batch, patches]``, attention of the class token in the last block; ``None`` unless asked for.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    kept: Tensor | None = None
    attention: Tensor | None = None


def taken(patches: Tensor, index: Tensor) -> Tensor:
    """``[batch, n, width]`` of ``[batch, patches, width]`` at the positions ``[batch, n]``."""
    return patches.gather(1, index[:, :, None].expand(-1, -1, patches.shape[2]))
