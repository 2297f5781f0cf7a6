"""Minimal method with a student and a teacher, to measure the overhead of a step without the cost of a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.augment.views import Batch
from pipeline.methods.base import Method, Step
from pipeline.methods.ema_teacher import Teacher
from pipeline.models.groups import ParameterGroup
from pipeline.training.engine import Engine, EngineOptions


@dataclass(frozen=True)
class Size:
    """Size of the student.

    Attributes:
        width: of its layers.
        depth: number of layers, each with a bias.
        samples: per micro-batch.
    """

    width: int = 64
    depth: int = 4
    samples: int = 8


class Plain(Method):
    """A student that is trained towards its own teacher on random vectors; has no collectives of its own.

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
        """Loss term ``distance``."""
        assert self.teacher is not None
        x = batch.views["view"][0]
        with torch.no_grad():
            targets = self.teacher.modules["backbone"](x)
        return {"distance": F.mse_loss(self.backbone(x), targets.flip(0))}

    def parameter_groups(self) -> list[ParameterGroup]:
        """A single group."""
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


@contextmanager
def alone(device: str = "cpu") -> Iterator[Path]:
    """Yield a folder, within a process group of this process alone if it is in none; also for tensors on the device."""
    with tempfile.TemporaryDirectory(prefix="fovea-bench-") as folder:
        if dist.is_initialized():
            yield Path(folder)
            return
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            yield Path(folder)
        finally:
            dist.destroy_process_group()


def engine_of(method: Plain, size: Size) -> Engine:
    """A ZeRO 2 engine in fp32 for the method."""
    options = EngineOptions(2, "fp32", size.samples, 1, (0.9, 0.95), 1e-8, 3.0, "network")
    return Engine(method, options, torch.device("cpu"))


def advance(engine: Engine, method: Plain, batch: Batch, step: Step) -> None:
    """One minimal step of the engine."""
    terms = engine.forward_backward(batch, step)
    engine.step(step, torch.stack(list(terms.values())).isfinite().all())
    method.after_step(step)
