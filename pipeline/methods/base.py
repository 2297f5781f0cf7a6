"""The interface between methods and the trainer: views, named loss terms, extra state, hooks around a step.

The trainer knows no specific method and a method does not know the trainer. The trainer fixes the order of one step:
batch, schedules, ``before_accumulation`` on all micro-batches (teacher), then for each of them ``forward`` (student, loss terms)
and backward of the sum, finite check, optimizer step, ``after_step``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from pipeline.data.augment.views import Batch, TextSpec, ViewSet, ViewSpec, ViewStage
from pipeline.data.channel_settings import ChannelSettings
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.health_metrics import HealthMetrics
from pipeline.methods.shared.guidance import Guidance
from pipeline.models.groups import ParameterGroup


@dataclass(frozen=True)
class Step:
    """Position in the run and the schedules' values there. Computed by the trainer and passed in explicitly.

    Attributes:
        index: step number, from 0.
        samples_seen: samples consumed by the run before this step.
        epoch: ``samples_seen`` divided by the size of the training set.
        lr: learning rate, before each group's own multiplier.
        last_layer_lr: learning rate of groups marked ``last_layer`` (0 while they are frozen).
        backbone_share: factor of the learning rate of groups marked ``backbone``: 0 while the tower is frozen, then rising to 1.
        weight_decay: weight decay, before each group's own multiplier.
        momentum: EMA momentum of the teacher in ``after_step``.
        teacher_temperature: softmax temperature of the targets.
    """

    index: int = 0
    samples_seen: int = 0
    epoch: float = 0.0
    lr: float = 0.0
    last_layer_lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 1.0
    teacher_temperature: float = 0.07
    backbone_share: float = 1.0

    def lr_of(self, group: ParameterGroup) -> float:
        """Learning rate of a parameter group."""
        lr = self.last_layer_lr if group.last_layer else self.lr
        return lr * (self.backbone_share if group.backbone else 1.0) * group.lr_scale


class Method(nn.Module, ABC):
    """Base class of pretraining methods: student networks are submodules, all other state is held in plain attributes.

    Attributes:
        views: views that the data pipeline must produce, in the sizes used for evaluation and export.
        curriculum: the views at the beginning of the run, stage by stage; after it, steps use ``view_sets``.
        text: how the data pipeline tokenizes captions, or ``None`` if the method reads none. Must agree with
            ``MethodSettings.reads_text``.
        couples_batch: whether the loss of a sample depends on other samples of its (micro-)batch, so that gradient
            accumulation is not equivalent to a larger batch.
        teacher: EMA teacher of the student networks, or ``None``. Not a submodule, so that no engine wraps it.
        extra_state: fp32 tensors that are neither parameters nor teacher weights (centres, queues), saved with each checkpoint
            under their names. Equal on all ranks. Not buffers, because an engine may cast buffers to bf16.
        metrics: detached scalars of the last ``forward`` for logging; never part of the loss.
        constant_names: names of parameters that never change in a run; a checkpoint shares their file with the one before.
        start: the tower ``backbone`` as the run began with it, frozen, if the settings keep it (``adapt``).
        guidance: terms that discourage or encourage columns of metadata, if the settings name some (``guidance``).
        health_metrics: which of these metrics indicate training health, or ``None``.
    """

    views: tuple[ViewSpec, ...] = ()
    curriculum: tuple[ViewStage, ...] = ()
    text: TextSpec | None = None
    couples_batch: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.teacher: Teacher | None = None
        self.extra_state: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}
        self.constant_names: set[str] = set()
        self.start: nn.ModuleDict | None = None
        self.guidance: Guidance | None = None
        self.health_metrics: HealthMetrics | None = None

    @property
    def view_sets(self) -> tuple[ViewSet, ...]:
        """The sets of views of which each step draws one; only ``views``, unless the method mixes resolutions."""
        return (ViewSet(self.views),)

    @property
    def all_view_sets(self) -> tuple[ViewSet, ...]:
        """Every set of views of the run: those of the curriculum's stages, then ``view_sets``."""
        return (*(ViewSet(stage.views) for stage in self.curriculum), *self.view_sets)

    def of_channels(self, settings: ChannelSettings | None) -> Self:
        """Lets the views be of images with the channels of ``data.channels``, normalized as it says; returns the method."""
        self.views = tuple(view.of_channels(settings) for view in self.views)
        self.curriculum = tuple(
            replace(stage, views=tuple(view.of_channels(settings) for view in stage.views)) for stage in self.curriculum
        )
        return self

    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Processes all micro-batches of a step before the first :meth:`forward`, without gradients.

        A method whose loss couples samples makes accumulation equivalent to one large batch here: it keeps what the
        micro-batches need from each other; :meth:`forward` is then called with each of them, in this order.

        Args:
            batches: this rank's micro-batches; the same number on every rank.
            step: as for :meth:`forward`.
        """

    @abstractmethod
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Returns named scalar loss terms, already weighted; their sum is the loss."""

    def after_step(self, step: Step, applied: Tensor | None = None) -> None:
        """Updates the teacher and other state without gradients. Called after each optimizer step, but not a skipped one.

        Args:
            step: as for :meth:`forward`.
            applied: bool scalar on the device, if the host does not know yet whether the step was applied: where it is false, the
                teacher and ``extra_state`` must keep their values (see :func:`kept`). ``None`` if it was applied.
        """
        if self.teacher is not None:
            self.teacher.update(step.momentum, applied=applied)
        if self.guidance is not None:
            for name, new in self.guidance.moved(self.extra_state).items():
                self.extra_state[name] = kept(applied, new, self.extra_state[name])

    def on_step_skipped(self) -> None:
        """Discards what ``forward`` kept for :meth:`after_step`. Called instead of it when the host knows that a step was not
        applied.
        """
        if self.guidance is not None:
            self.guidance.forget()

    def networks(self) -> dict[str, nn.Module]:
        """Trained sub-networks by name; with network-wise clipping each is clipped by its own gradient norm."""
        return {name: m for name, m in self.named_children() if any(p.requires_grad for p in m.parameters())}

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """All trainable parameters, each in exactly one group."""

    @abstractmethod
    def export(self) -> dict[str, nn.Module]:
        """The networks for evaluation and export, by name."""

    def students(self, *, slow: bool = True) -> dict[str, nn.Module]:
        """Backbones, or with ``slow`` EMA teachers, of students besides the one that :meth:`export` calls ``backbone``."""
        return {}

    def move_state(self, device: torch.device | str) -> Self:
        """Moves teacher and extra state, which ``nn.Module.to`` does not reach; the engine moves the student."""
        if self.teacher is not None:
            self.teacher.to(device)
        self.extra_state = {name: tensor.to(device) for name, tensor in self.extra_state.items()}
        return self


def kept(applied: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """``new`` after an applied step, ``old`` after a skipped one; see :meth:`Method.after_step`."""
    return new if applied is None else torch.where(applied, new, old)


def seed(batch: Batch) -> None:
    """Seeds the random generators of the CPU and the batch's device with ``batch.seed``.

    Unlike ``torch.manual_seed`` it skips unused device types, for each of which that takes a stack trace (0.4 ms).
    """
    torch.default_generator.manual_seed(batch.seed)
    device = next(view.device for views in batch.views.values() for view in views)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(batch.seed)
