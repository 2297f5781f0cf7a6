"""Frozen networks of a method, such as a larger teacher or a Gram anchor."""

from __future__ import annotations

from typing import Self

from torch import nn
from typing_extensions import override


class Frozen(nn.ModuleDict):
    """Networks by name, fp32, without gradients, always in evaluation mode.

    A submodule of its method, so that an engine can shard it and every checkpoint contains it: resuming needs no other file.
    Its initial weights are those that ``MethodSettings.anchors`` names for the method's attribute.

    Args:
        modules: the networks, which become submodules.
    """

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__(modules)
        self.float().requires_grad_(False).eval()

    @override
    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)
