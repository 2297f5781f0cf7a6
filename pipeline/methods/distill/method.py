"""Distillation from a larger frozen teacher (DINOv2, arXiv 2304.07193, section 5).

Uses DINOv2's losses with these differences: the targets come from a frozen backbone and its heads; the student's crops are not
masked, all their patches are predicted, and ``drop_path`` should be 0. The student's EMA is still kept and is the exported
model.
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
    """A student that gets its targets from outside and sees unmasked crops."""

    @override
    def student_mask(self, masks: Masks) -> Tensor | None:
        """No patch is masked."""
        return None


class Distill(_Student):
    """Distillation; see the module. The frozen teacher runs once per crop, however many students train.

    Args:
        backbone: the student's backbone.
        judge: the frozen teacher's backbone, with the same patch size.
        settings: loss weights, temperatures, heads and views.
        others: backbones of further students by name. Students share only the targets, and their losses are summed, so each is
            updated as if trained alone, except for random draws (stochastic depth).
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
                cast(Method, other).teacher, other.extra_state = None, {}  # this method holds them
            own = {name: module for name, module in self.named_children() if name.startswith(("backbone", "dino", "ibot"))}
            self.teacher = Teacher(**own, others=self.others)

    @override
    @torch.no_grad()
    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Runs the frozen teacher, once for all students."""
        super().before_accumulation(batches, step)
        for other in self._others():
            other.on_step_skipped()
            other.copy_targets(self)

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """DINOv2's loss terms; those of further students are prefixed with ``name/``."""
        terms = super().forward(batch, step)
        for name, other in self._named():
            terms |= {f"{name}/{term}": value for term, value in other(batch, step).items()}
            self.metrics |= {f"{name}/{metric}": value for metric, value in other.metrics.items()}
        return terms

    @override
    def networks(self) -> dict[str, nn.Module]:
        """Each student's backbone and heads, each clipped by its own gradient norm."""
        own = {name: module for name, module in super().networks().items() if name != "others"}
        return own | {f"{name}.{part}": module for name, other in self._named() for part, module in other.networks().items()}

    @override
    def students(self, *, slow: bool = True) -> dict[str, nn.Module]:
        """Backbones of the further students."""
        if slow and self.teacher is not None and "others" in self.teacher.modules:
            return {name: self.teacher.modules["others"].get_submodule(f"{name}.backbone") for name, _ in self._named()}
        return {name: other.backbone for name, other in self._named()}

    def _named(self) -> list[tuple[str, _Student]]:
        return [(name, cast(_Student, other)) for name, other in self.others.items()] if hasattr(self, "others") else []

    def _others(self) -> list[_Student]:
        return [other for _, other in self._named()]

    @override
    def target_networks(self) -> Mapping[str, nn.Module]:
        """The frozen networks, which take the place of the EMA teacher."""
        return dict(self.judge.items())


def build(config: Config, settings: DistillSettings) -> Distill:
    """Builds the method with newly initialized students and a frozen backbone whose weights are loaded at the start of the run.

    Raises:
        ConfigError: teacher and student have different patch sizes.
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
                hint="Choose a student with the same patch size",
            )
    return Distill(student, judge, settings, others)
