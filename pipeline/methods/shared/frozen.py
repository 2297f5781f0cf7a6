"""Networks that a method looks at and that no step moves: a larger teacher, an earlier one."""

from __future__ import annotations

from typing import Self

from torch import nn
from typing_extensions import override


class Frozen(nn.ModuleDict):
    """Networks by name, fp32, without gradients, always in evaluation mode.

    A submodule of its method, so an engine may cut it, and every checkpoint holds it: a run that resumes needs no other file.
    Its first weights are those that ``MethodSettings.anchors`` names for the method's attribute.

    Args:
        modules: the networks, which become its own.
    """

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__(modules)
        self.float().requires_grad_(False).eval()

    @override
    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever the method around it does."""
        return super().train(False)
