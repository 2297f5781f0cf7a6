"""MoCo v2 (Chen, Fan, Girshick & He, "Improved baselines with momentum contrastive learning", arXiv 2003.04297).

Each query (the student's first view) is contrasted with its key (the teacher's second view) and the keys of many earlier
images, which a queue holds. This gives many negatives with small batches.

The queue is filled in the order of the samples' indices, independent of the world size. It drops the oldest keys as new ones
arrive, so its length need not be a multiple of the batch size.

The reference code shuffles images between ranks before the teacher's batch norms, so that a query cannot identify its key by
its rank's batch statistics. Here batch norms are synchronized over all ranks, so there is no such leak.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pipeline import losses
from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step, kept
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.mocov2.settings import Mocov2Settings
from pipeline.methods.shared.two_views import TwoViews
from pipeline.models.mlps import mlp
from pipeline.models.resnet import Tower, build_trunk


class MoCoV2(TwoViews):
    """MoCo v2; see the module. Local crops add LoGo's attraction: both global and all local crops predict the global crops' keys.

    Args:
        backbone: the student's backbone.
        settings: head, temperature, queue and views.
    """

    settings: Mocov2Settings

    def __init__(self, backbone: Tower, settings: Mocov2Settings) -> None:
        s = settings
        super().__init__(backbone, s, out=s.head_out)
        widths = (backbone.width, s.head_hidden or backbone.width, s.head_out)
        self.projector = mlp(widths, norm=s.head_norm, last_bias=True)
        self.teacher: Teacher = self.make_teacher(backbone=backbone, projector=self.projector)
        self.extra_state = {"queue": F.normalize(torch.randn(s.queue, s.head_out), dim=1)}
        self.couples_batch = self.sees_batches()
        self._new: list[tuple[Tensor, Tensor]] = []

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss term ``contrastive``; with local repulsion also ``repel`` and ``judge``."""
        large, small = batch.views["global"], batch.views.get("local", [])
        backbone, projector = self.teacher.modules.values()
        with torch.no_grad(), self.teacher.batch_statistics():
            projected = {g: projector(backbone(large[g], patches="none").cls) for g in ((0, 1) if small else (1,))}
            keys = {g: F.normalize(key.float(), dim=1) for g, key in projected.items()}
        queries = [self.projector(self.student(view, batch, number)) for number, view in enumerate(large if small else large[:1])]
        local = [self.projector(self.backbone(view, local=True, patches="none").cls) for view in small]
        pairs = [(q, keys[1 - i]) for i, q in enumerate(queries)] + [(q, key) for q in local for key in keys.values()]
        terms = [losses.queue_contrast(q, key, self.extra_state["queue"], self.settings.temperature) for q, key in pairs]
        self._new.append((batch.numbers(), keys[1]))
        self.watch(queries)
        return {"contrastive": torch.stack(terms).mean(), **self.repelled(local)}

    @override
    def after_step(self, step: Step, applied: Tensor | None = None) -> None:
        """Updates the teacher, and enqueues the keys of all ranks, the newest first."""
        super().after_step(step, applied)
        ids, keys = (torch.cat(parts) for parts in zip(*self._new, strict=True))
        order = losses.gathered(ids[:, None])[:, 0].argsort(descending=True, stable=True)
        new = losses.gathered(keys)[order]
        old = self.extra_state["queue"]
        self.extra_state["queue"] = kept(applied, torch.cat([new, old])[: self.settings.queue], old)
        self._new.clear()

    @override
    def on_step_skipped(self) -> None:
        """Discards the keys of the skipped batch."""
        super().on_step_skipped()
        self._new.clear()


def build(config: Config, settings: Mocov2Settings) -> MoCoV2:
    """Builds MoCo v2 with a newly initialized backbone."""
    return MoCoV2(build_trunk(config.model, image_size=settings.views.global_size), settings)
