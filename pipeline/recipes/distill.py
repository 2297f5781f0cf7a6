"""Distillation from a larger frozen teacher (DINOv2, arXiv 2304.07193, section 5).

DINOv2's losses with three differences: the targets are those of a frozen tower and its heads, the student sees whole crops and
answers for every patch of them, and nothing is dropped. The slow copy of the student is still kept: it is the model in the end.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from typing_extensions import override

from pipeline.data.views import Masks
from pipeline.errors import ConfigError
from pipeline.methods.distill import DistillSettings
from pipeline.models.vision import VisionTower, build_tower
from pipeline.recipes.dinov2 import DINOv2, prototype_head
from pipeline.recipes.frozen import Frozen
from pipeline.settings import Config


class Distill(DINOv2):
    """The method; see the module.

    Args:
        backbone: the student's tower.
        judge: the frozen teacher's, with its patch.
        settings: weights, temperatures, heads and views.
    """

    def __init__(self, backbone: VisionTower, judge: VisionTower, settings: DistillSettings) -> None:
        super().__init__(backbone, settings)
        heads: dict[str, nn.Module] = {"dino_head": prototype_head(judge.width, settings)}
        if not settings.shared_heads:
            heads["ibot_head"] = prototype_head(judge.width, settings, ibot=True)
        self.judge = Frozen(backbone=judge, **heads)

    @override
    def judges(self) -> Mapping[str, nn.Module]:
        """The frozen networks, in the teacher's place."""
        return dict(self.judge.items())

    @override
    def hidden(self, masks: Masks) -> Tensor | None:
        """Nothing is hidden."""
        return None


def build(config: Config, settings: DistillSettings) -> Distill:
    """The method around a fresh student and a frozen tower that is filled at the start of the run.

    Raises:
        ConfigError: patches of two sizes.
    """
    student = build_tower(config.model, image_size=settings.views.global_size)
    judge = build_tower(settings.judge, image_size=settings.views.global_size)
    if student.patch != judge.patch:
        raise ConfigError(
            f"the student's patches have {student.patch} pixels a side and the frozen teacher's {judge.patch}",
            where="recipe.judge.patch",
            mend="choose a student of the same patch",
        )
    return Distill(student, judge, settings)
