"""EMA teacher: an exponential moving average of the student's weights, in fp32.

In bf16 or fp16 the average would not change: at momentum 0.992 one step moves a weight by less than half a unit in the last
place. The teacher is therefore fp32 whatever the student's dtype, and averages the fp32 master weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError


class Teacher:
    """Frozen fp32 copies of student modules, in evaluation mode.

    A plain object on purpose: as a module attribute it would be registered with the student and passed to the optimizer.

    Args:
        modules: student modules by the names of the method's attributes, so that the teacher's parameter names are the
            student's.

    Example::

        self.teacher = Teacher(backbone=self.backbone, head=self.head)
        targets = self.teacher.modules["head"](self.teacher.modules["backbone"](images).cls)
    """

    def __init__(self, **modules: nn.Module) -> None:
        self._students = modules
        self.modules: dict[str, nn.Module] = {}
        for name, module in modules.items():
            frozen = copy.deepcopy(module).float().eval()
            frozen.requires_grad_(False)
            self.modules[name] = frozen
        self._pairs: list[tuple[Tensor, Tensor]] | None = None

    def follow(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Makes later updates use these tensors: this rank's shards of weights that an engine has partitioned.

        Args:
            pairs: the teacher's shard and the student's, fp32, of equal shape.
        """
        self._pairs = pairs

    @torch.no_grad()
    def update(self, momentum: float, masters: Mapping[str, Tensor] | None = None) -> None:
        """Sets every weight to ``momentum * teacher + (1 - momentum) * student``; copies buffers.

        Args:
            momentum: EMA momentum, 0 to 1.
            masters: fp32 student weights by name, where the modules hold only a lower-precision copy.
        """
        if self._pairs is not None and masters is None:
            weights, targets = [weight for weight, _ in self._pairs], [student.detach() for _, student in self._pairs]
        else:
            students = dict(self._student_tensors(parameters=True)) if masters is None else masters
            named = dict(self.named_parameters())
            weights, targets = list(named.values()), [students[name].detach().to(weight) for name, weight in named.items()]
        torch._foreach_lerp_(weights, targets, 1.0 - momentum)
        buffers = dict(self._student_tensors(parameters=False))
        for name, buffer in self.named_buffers():
            buffer.copy_(buffers[name])

    @torch.no_grad()
    def reset(self, masters: Mapping[str, Tensor] | None = None) -> None:
        """Copies the student's weights into the teacher: after loading weights, or after an engine broadcast rank 0's."""
        self.update(0.0, masters)

    def to(self, device: torch.device | str) -> Self:
        """Moves the copies to the device; the dtype stays fp32."""
        for module in self.modules.values():
            module.to(device)
        return self

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Weights under the student's names."""
        for name, module in self.modules.items():
            for inner, parameter in module.named_parameters():
                yield f"{name}.{inner}", parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers under the student's names."""
        for name, module in self.modules.items():
            for inner, buffer in module.named_buffers():
                yield f"{name}.{inner}", buffer

    def state_dict(self) -> dict[str, Tensor]:
        """All weights and buffers, fp32, under the student's names."""
        return {name: tensor.detach() for name, tensor in (*self.named_parameters(), *self.named_buffers())}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the output of :meth:`state_dict`, strictly.

        Raises:
            CheckpointError: names or shapes differ.
        """
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} tensors do not fit, the first is {wrong[0]!r}",
                where="teacher",
                hint="Load the checkpoint with the model settings it was written with",
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _student_tensors(self, *, parameters: bool) -> Iterator[tuple[str, Tensor]]:
        for name, module in self._students.items():
            for inner, tensor in module.named_parameters() if parameters else module.named_buffers():
                yield f"{name}.{inner}", tensor
