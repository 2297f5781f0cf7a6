"""What a method is to the trainer: views it wants, named loss terms it returns, state that no gradient moves.

The trainer knows no method and a method knows no trainer. The order of one step is the trainer's: schedules, batch,
``forward`` (teacher, student, terms), finite check, backward of the sum, optimiser step, ``after_step``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from pipeline.data.augment.views import Batch, TextSpec, ViewSet, ViewSpec
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.health_metrics import HealthMetrics
from pipeline.models.groups import ParameterGroup


@dataclass(frozen=True)
class Step:
    """Where the run is, and what the schedules say there. Evaluated by the trainer, passed in explicitly.

    Attributes:
        index: number of the step, from 0.
        samples_seen: samples of the run consumed before this step.
        epoch: ``samples_seen`` in units of the training set.
        lr: learning rate, before each group's own multiplier.
        last_layer_lr: learning rate of groups marked ``last_layer`` (0 while they are frozen).
        weight_decay: weight decay, before each group's own multiplier.
        momentum: share of the old teacher kept by ``after_step``.
        teacher_temperature: temperature of the targets.
    """

    index: int = 0
    samples_seen: int = 0
    epoch: float = 0.0
    lr: float = 0.0
    last_layer_lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 1.0
    teacher_temperature: float = 0.07


class Method(nn.Module, ABC):
    """One pretraining method: its student networks are submodules, all other state is plain.

    Attributes:
        views: what the data side must deliver, in the sizes that the method is judged and used at.
        text: what the data side must make of captions, or ``None`` if the method reads none. Its settings must say the same
            (``MethodSettings.reads_text``).
        teacher: slow copy of student networks, or ``None``. Not a submodule: no engine sees it.
        memory: fp32 tensors that are neither parameters nor the teacher's (centres, queues), saved with each checkpoint
            under their names. Equal on all ranks. Not buffers, because an engine may cast buffers to bf16.
        metrics: what the last ``forward`` wants logged: detached scalars that never enter the loss.
        vitals: which of these metrics tell whether the method is well, or ``None``.
        batch_coupled: whether the loss of a sample depends on the other samples of its (micro-)batch, so that gradient
            accumulation is not the same as a larger batch.
    """

    views: tuple[ViewSpec, ...] = ()
    text: TextSpec | None = None
    couples_batch: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.teacher: Teacher | None = None
        self.extra_state: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}
        self.health_metrics: HealthMetrics | None = None

    @property
    def view_sets(self) -> tuple[ViewSet, ...]:
        """The sets of views of which each step takes one: ``views`` alone, unless the method mixes sizes."""
        return (ViewSet(self.views),)

    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Looks at all micro-batches of a step before the first :meth:`forward`, without gradients.

        This is where a method whose samples see one another makes accumulation equal to one large batch: it keeps what the
        micro-batches have to know of each other, and :meth:`forward` is then called with each of them, in this order.

        Args:
            batches: this rank's micro-batches, every rank as many.
            step: as for :meth:`forward`.
        """

    @abstractmethod
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Named scalar loss terms, already weighted; their sum is the loss."""

    def after_step(self, step: Step) -> None:
        """Moves what no gradient moves. Called once after each applied optimiser step, never after a skipped one."""
        if self.teacher is not None:
            self.teacher.update(step.momentum)

    def on_step_skipped(self) -> None:
        """Drops what ``forward`` kept for :meth:`after_step`. Called instead of it when a step was not applied."""

    def networks(self) -> dict[str, nn.Module]:
        """Sub-networks that are trained, by name, each clipped by its own gradient norm."""
        return {name: m for name, m in self.named_children() if any(p.requires_grad for p in m.parameters())}

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """All trainable parameters, each in exactly one group."""

    @abstractmethod
    def export(self) -> dict[str, nn.Module]:
        """The networks worth keeping, by name: what evaluation and export read."""

    def students(self, *, slow: bool = True) -> dict[str, nn.Module]:
        """Towers by name that are trained beside the one :meth:`export` calls ``backbone``, or their slow copies."""
        return {}

    def place(self, device: torch.device | str) -> Self:
        """Moves teacher and memory, which ``nn.Module.to`` does not see; the student is the engine's to move."""
        if self.teacher is not None:
            self.teacher.to(device)
        self.extra_state = {name: tensor.to(device) for name, tensor in self.extra_state.items()}
        return self


def seed(batch: Batch) -> None:
    """What is drawn on the batch's device from now on depends on ``batch.seed`` alone: ``torch.manual_seed`` for one device,
    without the stack traces that it takes for every kind of device that is not in use (0.4 ms)."""
    torch.default_generator.manual_seed(batch.seed)
    device = next(view.device for views in batch.views.values() for view in views)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(batch.seed)
