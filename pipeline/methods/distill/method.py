"""Distillation from a larger frozen teacher (DINOv2, arXiv 2304.07193, section 5).

DINOv2's losses with three differences: the targets are those of a frozen tower and its heads, the student sees whole crops and
answers for every patch of them, and nothing is dropped. The slow copy of the student is still kept: it is the model in the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch, Masks
from pipeline.errors import ConfigError
from pipeline.methods.base import Method, Step
from pipeline.methods.dinov2.method import DINOv2, prototype_head
from pipeline.methods.distill.settings import DistillSettings
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.shared.frozen import Frozen
from pipeline.models.vision import VisionTower, build_tower


class _Student(DINOv2):
    """A student that is told its targets, and sees whole crops."""

    @override
    def hidden(self, masks: Masks) -> Tensor | None:
        """Nothing is hidden."""
        return None


class Distill(_Student):
    """The method; see the module. The frozen teacher reads each crop once, however many students learn from it.

    Args:
        backbone: the student's tower.
        judge: the frozen teacher's, with its patch.
        settings: weights, temperatures, heads and views.
        others: towers of further students by name. They share nothing but the targets: their terms are summed, so each moves as
            it would alone, but for what is drawn at random (stochastic depth).
    """

    def __init__(
        self,
        backbone: VisionTower,
        judge: VisionTower,
        settings: DistillSettings,
        others: Mapping[str, VisionTower] | None = None,
    ) -> None:
        super().__init__(backbone, settings)
        heads: dict[str, nn.Module] = {"dino_head": prototype_head(judge.width, settings)}
        if not settings.shared_heads:
            heads["ibot_head"] = prototype_head(judge.width, settings, ibot=True)
        self.judge = Frozen(backbone=judge, **heads)

        if others:
            self.others = nn.ModuleDict({name: _Student(tower, settings) for name, tower in others.items()})
            for other in self._others():
                cast(Method, other).teacher, other.extra_state = None, {}  # this method keeps them
            own = {name: module for name, module in self.named_children() if name.startswith(("backbone", "dino", "ibot"))}
            self.teacher = Teacher(**own, others=self.others)

    @override
    @torch.no_grad()
    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """The frozen teacher's part of a step, once for all students."""
        super().before_accumulation(batches, step)
        for other in self._others():
            other.on_step_skipped()
            other.told(self)

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """DINOv2's terms, and those of further students under ``name/``."""
        terms = super().forward(batch, step)
        for name, other in self._named():
            terms |= {f"{name}/{term}": value for term, value in other(batch, step).items()}
            self.metrics |= {f"{name}/{metric}": value for metric, value in other.metrics.items()}
        return terms

    @override
    def networks(self) -> dict[str, nn.Module]:
        """Each student's tower and heads, each clipped by itself."""
        own = {name: module for name, module in super().networks().items() if name != "others"}
        return own | {f"{name}.{part}": module for name, other in self._named() for part, module in other.networks().items()}

    @override
    def students(self, *, slow: bool = True) -> dict[str, nn.Module]:
        """The further students' towers."""
        if slow and self.teacher is not None and "others" in self.teacher.modules:
            return {name: self.teacher.modules["others"].get_submodule(f"{name}.backbone") for name, _ in self._named()}
        return {name: other.backbone for name, other in self._named()}

    def _named(self) -> list[tuple[str, _Student]]:
        return [(name, cast(_Student, other)) for name, other in self.others.items()] if hasattr(self, "others") else []

    def _others(self) -> list[_Student]:
        return [other for _, other in self._named()]

    @override
    def judges(self) -> Mapping[str, nn.Module]:
        """The frozen networks, in the teacher's place."""
        return dict(self.judge.items())


def build(config: Config, settings: DistillSettings) -> Distill:
    """The method around fresh students and a frozen tower that is filled at the start of the run.

    Raises:
        ConfigError: patches of two sizes.
    """
    student = build_tower(config.model, image_size=settings.views.global_size)
    judge = build_tower(settings.teacher_model, image_size=settings.views.global_size)
    others = {other.name: build_tower(other, image_size=settings.views.global_size) for other in settings.students}
    for where, tower in {
        "method.teacher_model.patch_size": student,
        **{f"method.students ({n})": t for n, t in others.items()},
    }.items():
        if tower.patch != judge.patch:
            raise ConfigError(
                f"the student's patches have {tower.patch} pixels a side and the frozen teacher's {judge.patch}",
                where=where,
                hint="choose a student of the same patch",
            )
    return Distill(student, judge, settings, others)
