"""What ``fovea replay --dump`` writes of each step: the batch, norms of activations by block, norms of gradients by parameter.

``step-<step>-rank-<rank>.html``             views, keys and captions of the rank's samples
``activations-<step>-rank-<rank>.csv``       of each block's output: micro-batch, name, root mean square, largest absolute value
``gradients-<step>.csv``                     of each parameter's gradient over all ranks, before clipping: norm and largest value
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.augment.views import Batch
from pipeline.methods.base import Method, Step
from pipeline.models.text import TextBlock
from pipeline.models.vision import VisionTower
from pipeline.reports import batch_page
from pipeline.training.trainer import Trainer


class Dump:
    """Observes the steps of a trainer, from ``first`` on.

    Args:
        folder: where to; created.
        trainer: the trainer, before its first step.
        first: the first step to write.
    """

    def __init__(self, folder: Path, trainer: Trainer, first: int) -> None:
        self._folder, self._first, self._world = folder, first, trainer.world
        self._shapes = dict(trainer.engine.shapes)
        self._batches: list[Batch] = []
        self._activations: list[tuple[int, str, Tensor]] = []
        folder.mkdir(parents=True, exist_ok=True)
        trainer.engine.observe_gradients = self._write
        method = trainer.method
        self._hooks: list[Any] = [method.register_forward_pre_hook(self._begin)]
        self._hooks += [block.register_forward_hook(self._observer(name)) for name, block in blocks(method).items()]

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._batches.append(arguments[0])

    def _observer(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def observe(module: nn.Module, arguments: Any, output: Any) -> None:
            tensor = (output[0] if isinstance(output, tuple) else output).detach().float()
            numbers = torch.stack([tensor.square().mean().sqrt(), tensor.abs().max()])
            self._activations.append((len(self._batches), name, numbers))

        return torch._dynamo.disable(observe)

    def _write(self, step: Step, gradients: Sequence[tuple[str, Tensor]]) -> None:
        """Called by the engine when all gradients of a step are there, and nothing is clipped yet."""
        batches, activations = self._batches, self._activations
        self._batches, self._activations = [], []
        if step.index < self._first:
            return
        rank, number = self._world.rank, f"{step.index:06d}"
        batch_page.write(self._folder / f"step-{number}-rank-{rank}.html", batches, step=step.index, rank=rank)
        with (self._folder / f"activations-{number}-rank-{rank}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["micro_batch", "block", "rms", "largest"])
            # What runs before the first forward pass, as a teacher does on all micro-batches, has no micro-batch of its own.
            rows.writerows([count - 1 if count else "", name, *numbers.tolist()] for count, name, numbers in activations)
        self._gradients(number, gradients)

    def _gradients(self, number: str, gradients: Sequence[tuple[str, Tensor]]) -> None:
        """Sums the ranks' shares; collective."""
        places = {name: position for position, name in enumerate(self._shapes)}
        device = self._world.device
        squares = torch.zeros(len(places), dtype=torch.float64, device=device)
        largest = torch.zeros(len(places), dtype=torch.float64, device=device)
        for name, gradient in gradients:
            if gradient.numel():
                values = gradient.detach().double()
                squares[places[name]] += values.square().sum().to(device)
                largest[places[name]] = torch.maximum(largest[places[name]], values.abs().max().to(device))
        dist.all_reduce(squares)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if self._world.rank == 0:
            with (self._folder / f"gradients-{number}.csv").open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["parameter", "shape", "norm", "largest"])
                table = zip(self._shapes.items(), squares.sqrt().tolist(), largest.tolist(), strict=True)
                rows.writerows([name, "x".join(map(str, shape)), norm, most] for (name, shape), norm, most in table)


def blocks(method: Method) -> dict[str, nn.Module]:
    """Transformer blocks of the student and, as ``teacher.…``, of the teacher, by name; without any the children of networks."""
    roots: dict[str, nn.Module] = {"": method}
    if method.teacher is not None:
        roots |= {f"teacher.{name}.": module for name, module in method.teacher.modules.items()}
    chosen: dict[str, nn.Module] = {}
    for start, root in roots.items():
        for name, module in root.named_modules():
            if isinstance(module, VisionTower):
                above = f"{start}{name}.vit.blocks.".replace("..", ".")
                chosen |= {f"{above}{position}": block for position, block in enumerate(module.vit.blocks)}
            elif isinstance(module, TextBlock):
                chosen[f"{start}{name}"] = module
    if not chosen:
        for start, root in roots.items():
            children = ((name, child) for name, child in root.named_modules() if name and name.count(".") <= 1)
            chosen |= {f"{start}{name}": child for name, child in children}
    return chosen
