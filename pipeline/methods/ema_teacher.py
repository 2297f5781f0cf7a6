"""EMA teacher: an exponential moving average of the student's weights, in fp32.

In bf16 or fp16 the average would not change: at momentum 0.992 one step moves a weight by less than half a unit in the last
place. The teacher is therefore fp32 whatever the student's dtype, and averages the fp32 master weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Self

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.models.norms import batch_statistics


class Teacher:
    """Frozen fp32 copies of student modules, in evaluation mode.

    A plain object on purpose: as a module attribute it would be registered with the student and passed to the optimizer.

    Args:
        modules: student modules by the names of the method's attributes, so that the teacher's parameter names are the
            student's.

    Attributes:
        own_statistics: whether the running statistics of batch norms are the teacher's own, from its passes within
            :meth:`batch_statistics`; otherwise they are copies of the student's, like all other buffers.

    Example::

        self.teacher = Teacher(backbone=self.backbone, head=self.head)
        targets = self.teacher.modules["head"](self.teacher.modules["backbone"](images).cls)
    """

    def __init__(self, **modules: nn.Module) -> None:
        self.own_statistics = False
        self._students = modules
        self.modules: dict[str, nn.Module] = {}
        for name, module in modules.items():
            frozen = copy.deepcopy(module).float().eval()
            frozen.requires_grad_(False)
            self.modules[name] = frozen
        self._followed: list[tuple[Tensor, Tensor]] | None = None
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None
        self._runs: list[tuple[Tensor, Tensor]] | None = None
        self._buffers: list[tuple[nn.Module, nn.Module, str]] | None = None

    def batch_statistics(self) -> AbstractContextManager[None]:
        """Context of a forward pass on a training batch, see :func:`pipeline.models.norms.batch_statistics`.

        The teacher's own running statistics then include the batch, also of a step that is skipped later, like the student's.
        """
        return batch_statistics(*self.modules.values(), update=self.own_statistics)

    def follow(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Makes later updates use these tensors: this rank's shards of weights that an engine has partitioned.

        Args:
            pairs: the teacher's shard and the student's, fp32, of equal shape.
        """
        self._followed, self._pairs, self._runs = pairs, None, None

    @torch.no_grad()
    def align(self) -> None:
        """Moves the weights into one block of memory, in the order in which an engine has laid out the student's: where both are
        neighbours, :meth:`update` treats them as one tensor.
        """
        weights, students = self._weights()
        block = torch.empty(sum(w.numel() for w in weights), dtype=torch.float32, device=weights[0].device)
        start = 0
        for _, weight in sorted(zip(students, weights, strict=True), key=lambda pair: pair[0].data_ptr()):
            weight.data = block.narrow(0, start, weight.numel()).view(weight.shape).copy_(weight)
            start += weight.numel()
        self._runs = _joined(weights, students)

    @torch.no_grad()
    def update(self, momentum: float, masters: Mapping[str, Tensor] | None = None, applied: Tensor | None = None) -> None:
        """Sets every weight to ``momentum * teacher + (1 - momentum) * student``; copies buffers, except own statistics.

        Args:
            momentum: EMA momentum, 0 to 1.
            masters: fp32 student weights by name, where the modules hold only a lower-precision copy.
            applied: bool scalar on the device: nothing changes where it is false. ``None`` is the same as true.
        """
        weights, students = self._weights()
        if masters is not None:
            named = dict(self.named_parameters())
            weights, students = list(named.values()), [masters[name].detach().to(weight) for name, weight in named.items()]
        elif any(student.dtype != weight.dtype for student, weight in zip(students, weights, strict=True)):
            students = [student.to(weight) for student, weight in zip(students, weights, strict=True)]
        if applied is None:
            torch._foreach_lerp_(weights, students, 1.0 - momentum)
        else:
            # A weight of 0 leaves the teacher as it is, bit for bit: the student of a skipped step is finite.
            share = applied * (1.0 - momentum)
            for weight, student in (masters is None and self._runs) or zip(weights, students, strict=True):
                weight.lerp_(student, share)
        self._copy_buffers(applied, statistics=not self.own_statistics)

    def _weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights to update and the student's, in lists that are built once: walking through the modules takes longer than
        the update.
        """
        if self._pairs is None:
            if self._followed is not None:
                self._pairs = [weight for weight, _ in self._followed], [student.detach() for _, student in self._followed]
            else:
                students = dict(self._student_tensors(parameters=True))
                named = dict(self.named_parameters())
                self._pairs = list(named.values()), [students[name] for name in named]
        return self._pairs

    def _copy_buffers(self, applied: Tensor | None, *, statistics: bool) -> None:
        """Copies the student's buffers, those of batch norms only with ``statistics``, in one call for each dtype. They are
        looked up each time, since a module may replace them.
        """
        if self._buffers is None:
            self._buffers = [
                (frozen, student, key)
                for name, module in self.modules.items()
                for frozen, student in zip(module.modules(), self._students[name].modules(), strict=True)
                for key, buffer in frozen._buffers.items()
                if buffer is not None
            ]
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for frozen, student, key in self._buffers:
            if not statistics and isinstance(frozen, nn.modules.batchnorm._BatchNorm):
                continue
            ours, theirs = frozen._buffers[key], student._buffers[key]
            assert ours is not None and theirs is not None
            to, source = by_dtype.setdefault(ours.dtype, ([], []))
            to.append(ours)
            source.append(theirs)
        for to, source in by_dtype.values():
            if applied is not None:
                source = [torch.where(applied, new, old) for new, old in zip(source, to, strict=True)]
            torch._foreach_copy_(to, source)

    @torch.no_grad()
    def reset(self, masters: Mapping[str, Tensor] | None = None) -> None:
        """Copies the student's weights into the teacher: after loading weights, or after an engine broadcast rank 0's."""
        self.update(0.0, masters)
        self._copy_buffers(None, statistics=True)

    def to(self, device: torch.device | str) -> Self:
        """Moves the copies to the device; the dtype stays fp32."""
        for module in self.modules.values():
            module.to(device)
        self._pairs = self._runs = None
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


def _joined(weights: list[Tensor], students: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of fp32 tensors that hold the same elements, flattened; pairs that are neighbours in memory on both sides are one."""
    joined: list[tuple[Tensor, Tensor]] = []
    for student, weight in sorted(zip(students, weights, strict=True), key=lambda pair: pair[0].data_ptr()):
        pair = weight.detach().view(-1), student.detach().view(-1)
        if joined and all(_adjacent(before, after) for before, after in zip(joined[-1], pair, strict=True)):
            length = joined[-1][0].numel() + weight.numel()
            pair = joined[-1][0].as_strided((length,), (1,)), joined[-1][1].as_strided((length,), (1,))
            joined.pop()
        joined.append(pair)
    return joined


def _adjacent(before: Tensor, after: Tensor) -> bool:
    same = before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
    return same and int(before.storage_offset()) + before.numel() == int(after.storage_offset())
