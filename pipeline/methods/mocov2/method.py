"""MoCo v2 (Chen, Fan, Girshick & He, "Improved baselines with momentum contrastive learning", arXiv 2003.04297).

A query, the student's first view, has to find its key, the teacher's second view, among the keys of many earlier pictures that a
queue remembers. So negatives are many though batches are small.

The queue follows the pictures' numbers, whichever rank saw them: another number of ranks fills it in the same order. It loses its
oldest keys as new ones come, so its length need not be a multiple of the batch.

The reference shuffles pictures between ranks before the teacher's batch norms, lest a query recognise its key by the statistics
of the few pictures that shared its rank. Here batch norms see all ranks, and there is no such signature to hide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pipeline import losses
from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.mocov2.settings import Mocov2Settings
from pipeline.methods.shared.two_views import TwoViews
from pipeline.models.mlps import mlp
from pipeline.models.norms import batch_statistics
from pipeline.models.resnet import Tower, build_trunk


class MoCoV2(TwoViews):
    """The method; see the module. With local crops, LoGo's attraction: both globals and each local find the globals' keys.

    Args:
        backbone: the student's tower.
        settings: head, temperature, queue and views.
    """

    settings: Mocov2Settings

    def __init__(self, backbone: Tower, settings: Mocov2Settings) -> None:
        s = settings
        super().__init__(backbone, s, out=s.head_out)
        widths = (backbone.width, s.head_hidden or backbone.width, s.head_out)
        self.projector = mlp(widths, norm=s.head_norm, last_bias=True)
        self.teacher: Teacher = Teacher(backbone=backbone, projector=self.projector)
        self.extra_state = {"queue": F.normalize(torch.randn(s.queue, s.head_out), dim=1)}
        self.couples_batch = self.sees_batches()
        self._new: list[tuple[Tensor, Tensor]] = []

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Term ``contrastive``, and those of repulsion."""
        large, small = batch.views["global"], batch.views.get("local", [])
        backbone, projector = self.teacher.modules.values()
        with torch.no_grad(), batch_statistics(backbone, projector):
            judged = {g: projector(backbone(large[g], patches="none").cls) for g in ((0, 1) if small else (1,))}
            keys = {g: F.normalize(key.float(), dim=1) for g, key in judged.items()}
        queries = [self.projector(self.backbone(view, patches="none").cls) for view in (large if small else large[:1])]
        local = [self.projector(self.backbone(view, local=True, patches="none").cls) for view in small]
        pairs = [(q, keys[1 - i]) for i, q in enumerate(queries)] + [(q, key) for q in local for key in keys.values()]
        terms = [losses.queue_contrast(q, key, self.extra_state["queue"], self.settings.temperature) for q, key in pairs]
        self._new.append((torch.tensor(batch.ids, dtype=torch.int64, device=keys[1].device), keys[1]))
        self.watch(queries)
        return {"contrastive": torch.stack(terms).mean(), **self.repelled(local)}

    @override
    def after_step(self, step: Step) -> None:
        """Moves the teacher, and puts the keys of all ranks into the queue, the newest first."""
        super().after_step(step)
        ids, keys = (torch.cat(parts) for parts in zip(*self._new, strict=True))
        order = losses.gathered(ids[:, None])[:, 0].argsort(descending=True, stable=True)
        new = losses.gathered(keys)[order]
        self.extra_state["queue"] = torch.cat([new, self.extra_state["queue"]])[: self.settings.queue]
        self._new.clear()

    @override
    def on_step_skipped(self) -> None:
        """Forgets the keys of the skipped batch."""
        self._new.clear()


def build(config: Config, settings: Mocov2Settings) -> MoCoV2:
    """The method around a fresh tower."""
    return MoCoV2(build_trunk(config.model, image_size=settings.views.global_size), settings)
