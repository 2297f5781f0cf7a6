"""DINO (Caron et al., "Emerging properties in self-supervised vision transformers", arXiv 2104.14294).

The student sees two global and several local crops, its EMA teacher only the global ones. Both output a distribution over
prototypes, and each student crop predicts the teacher's distribution of every *other* global crop. There are no negatives. Two
operations on the teacher's logits prevent collapse: subtracting a running centre keeps single prototypes from dominating, and
a low temperature (sharpening) keeps the distribution from becoming uniform.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from pipeline import losses
from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step, kept
from pipeline.methods.dino.settings import DinoSettings
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.health_metrics import distillation_health
from pipeline.methods.shared.two_views import TwoViews
from pipeline.models.heads import PrototypeHead
from pipeline.models.resnet import Tower, build_trunk


class DINO(TwoViews):
    """DINO; see the module.

    The centre comes from earlier batches, so accumulating micro-batches is equivalent to one large batch, except for batch
    norms in a ResNet or in the head.

    Args:
        backbone: the student's backbone.
        settings: head, temperatures and views.
    """

    settings: DinoSettings

    def __init__(self, backbone: Tower, settings: DinoSettings) -> None:
        s = settings
        super().__init__(backbone, s, out=s.head_bottleneck)
        self.head = PrototypeHead(
            backbone.width,
            hidden=s.head_hidden,
            bottleneck=s.head_bottleneck,
            prototypes=s.prototypes,
            layers=s.head_layers,
            batch_norm=s.head_norm == "batch",
        )
        if s.freeze_gain and self.head.last.gain is not None:
            self.head.last.gain.requires_grad_(False)
        self.teacher: Teacher = self.make_teacher(backbone=backbone, head=self.head)
        self.extra_state = {"center": torch.zeros(s.prototypes)}
        self.couples_batch = self.sees_batches()
        self.health_metrics = distillation_health(
            s.prototypes, s.student_temperature, centred=True, center_momentum=s.center_momentum, koleo=0.0
        )
        self._sums: list[tuple[Tensor, int]] = []

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss term ``dino``; with local repulsion also ``repel`` and ``judge``."""
        s, locals_ = self.settings, batch.views.get("local", [])
        globals_ = torch.cat(batch.views["global"])
        targets = self._targets(globals_, step)
        seen = self.student(globals_, batch)
        samples, cls = len(seen) // 2, [seen]
        if locals_:
            cls.append(self.backbone(torch.cat(locals_), local=True, patches="none").cls)
        pairings = losses.multi_crop_pairings(len(locals_))
        count = sum(sum(p.targets) * (p.views[1] - p.views[0]) for p in pairings)
        each = seen.new_full((samples,), 1 / (samples * count))

        def compared(unit: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
            crops = unit.unflatten(0, (-1, samples))
            terms, watched = losses.prototype_cross_entropy(
                crops, matrix, targets, pairings, each, s.student_temperature, rows=s.prototype_chunk_size, watch=True
            )
            return terms.sum(), *(watched or ()), crops[2:]

        loss, *watched, units = self.head(torch.cat(cls), compared)
        self._look(loss.detach(), losses.TargetStatistics(*watched), 2 * samples, seen[:samples])
        return {"dino": loss, **self.repelled(units.unbind())}

    @override
    def after_step(self, step: Step, applied: Tensor | None = None) -> None:
        """Updates the teacher, and the centre with the mean of the teacher's logits since the last step."""
        super().after_step(step, applied)
        mean = losses.global_mean(torch.stack([total for total, _ in self._sums]).sum(0), sum(n for _, n in self._sums))
        old = self.extra_state["center"]
        self.extra_state["center"] = kept(applied, losses.moved_center(old, mean, self.settings.center_momentum), old)
        self._sums.clear()

    @override
    def on_step_skipped(self) -> None:
        """Discards the skipped batch, whose mean may not be finite."""
        super().on_step_skipped()
        self._sums.clear()

    @override
    def export(self) -> dict[str, nn.Module]:
        """The teacher's backbone, as ``backbone``."""
        return {"backbone": self.teacher.modules["backbone"]}

    @torch.no_grad()
    def _targets(self, images: Tensor, step: Step) -> losses.Targets:
        backbone, head = self.teacher.modules.values()
        assert isinstance(head, PrototypeHead)
        with self.teacher.batch_statistics():
            units = head.units(backbone(images, patches="none").cls)
        matrix = head.matrix(units.dtype)
        with torch.autocast(units.device.type, enabled=False):
            self._sums.append(
                (matrix.float() @ units.float().sum(0), len(units))
            )  # logits are linear in features: summing features first is cheaper
        potential = -self.extra_state["center"] / step.teacher_temperature
        return losses.Targets(units.unflatten(0, (2, -1)), matrix, potential, step.teacher_temperature)

    @torch.no_grad()
    def _look(self, loss: Tensor, watched: losses.TargetStatistics, rows: int, features: Tensor) -> None:
        """Records collapse metrics: a loss of ln K or an entropy of 1, a mean target of one prototype, features of rank 1."""
        uniform, mass = math.log(self.settings.prototypes), watched.target_sum / rows
        self.metrics = {
            "target_entropy": watched.entropy / rows / uniform,
            "prototype_entropy": -torch.xlogy(mass, mass).sum() / uniform,
            "dino_loss_vs_log_k": uniform - loss,
            "teacher_student_top1_agreement": watched.top1_agreements / rows,
            "feature_rank": losses.effective_rank(features),
            "feature_std": losses.spread(features),
        }


def build(config: Config, settings: DinoSettings) -> DINO:
    """Builds DINO with a newly initialized backbone."""
    return DINO(build_trunk(config.model, image_size=settings.views.global_size), settings)
