"""The smallest method with a student and a teacher: what is left of a step when no model takes its time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.views import Batch
from pipeline.models.groups import ParameterGroup
from pipeline.recipes.base import Recipe, Step
from pipeline.recipes.teacher import Teacher


@dataclass(frozen=True)
class Size:
    """Of the student.

    Attributes:
        width: of its layers.
        depth: layers, each with a bias.
        samples: of a micro-batch.
    """

    width: int = 64
    depth: int = 4
    samples: int = 8


class Plain(Recipe):
    """A student follows its own teacher on random vectors; speaks with no other rank itself.

    Args:
        size: see :class:`Size`.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for _ in range(size.depth) for layer in (nn.Linear(size.width, size.width), nn.Tanh())]
        self.backbone = nn.Sequential(*layers)
        self.teacher = Teacher(backbone=self.backbone)

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Term ``distance``."""
        assert self.teacher is not None
        x = batch.views["view"][0]
        with torch.no_grad():
            wanted = self.teacher.modules["backbone"](x)
        return {"distance": F.mse_loss(self.backbone(x), wanted.flip(0))}

    def parameter_groups(self) -> list[ParameterGroup]:
        """One."""
        names, parameters = zip(*self.named_parameters(), strict=True)
        return [ParameterGroup(tuple(parameters), tuple(names), 1.0, 1.0, False)]

    def export(self) -> dict[str, nn.Module]:
        """The student."""
        return {"backbone": self.backbone}


def batch_of(size: Size, seed: int = 0) -> Batch:
    """A micro-batch of random vectors."""
    vectors = torch.randn(size.samples, size.width, generator=torch.Generator().manual_seed(seed))
    numbers = list(range(size.samples))
    return Batch({"view": [vectors]}, torch.full((size.samples,), -1), [str(n) for n in numbers], numbers, 0)
