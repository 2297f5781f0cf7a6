"""MoCo v3 (Chen, Xie & He, "An empirical study of training self-supervised vision transformers", arXiv 2104.02057).

Each query (the student's projected and predicted view) is contrasted with the teacher's projections of the other view of all
images in the global batch, and symmetrically with the views exchanged. Negatives come only from the other view: unlike in
SimCLR, no view is contrasted with views of its own kind.

The teacher is updated after each step; the reference code updates it before the next forward pass. The teacher in the forward
pass is the same, that in checkpoints is the newer one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from pipeline import losses
from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.mocov3.settings import Mocov3Settings
from pipeline.methods.shared.two_views import TwoViews
from pipeline.models.mlps import mlp
from pipeline.models.resnet import Tower, build_trunk, fix_positions, freeze_patches


@dataclass(frozen=True)
class _Keys:
    """The teacher's projections of both views of the global batch, ``[B, out]`` each, and the first row of each micro-batch."""

    batch: Batch
    views: list[Tensor]
    first: int


class MoCoV3(TwoViews):
    """MoCo v3; see the module.

    Keys need no gradient, so the teacher processes all micro-batches before the student's first forward pass, and accumulation
    is equivalent to one large batch, except for batch norms.

    Args:
        backbone: the student's backbone.
        settings: heads, temperature and views.
    """

    settings: Mocov3Settings

    def __init__(self, backbone: Tower, settings: Mocov3Settings) -> None:
        s = settings
        if s.freeze_patches:
            freeze_patches(backbone)
        if s.pos_embed == "sincos":
            fix_positions(backbone)
        super().__init__(backbone, s, out=s.head_out)
        hidden = (s.head_hidden,) * (s.head_layers - 1)
        self.projector = mlp((backbone.width, *hidden, s.head_out), norm=s.head_norm, last="plain_norm", bias=False)
        widths = (s.head_out, s.head_hidden, s.head_out)
        self.predictor = mlp(widths, norm=s.head_norm, last="plain_norm" if s.predictor_norm else "none", bias=False)
        self.teacher: Teacher = self.make_teacher(backbone=backbone, projector=self.projector)
        self.couples_batch = self.sees_batches()
        self._keys: deque[_Keys] = deque()

    @override
    @torch.no_grad()
    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Computes the keys of all micro-batches of all ranks."""
        backbone, projector = self.teacher.modules.values()
        with self.teacher.batch_statistics():
            own = [[projector(backbone(view, patches="none").cls).float() for view in batch.views["global"]] for batch in batches]
        full = [torch.cat(view) for view in zip(*own, strict=True)]
        first, everyone = losses.rank_offset(len(full[0])), [losses.gathered(view) for view in full]
        starts = [first + sum(len(views[0]) for views in own[:i]) for i in range(len(own))]
        self._keys = deque(_Keys(batch, everyone, start) for batch, start in zip(batches, starts, strict=True))

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss term ``contrastive``, the sum of both directions; with local repulsion also ``repel`` and ``judge``."""
        if not self._keys or self._keys[0].batch is not batch:
            self.before_accumulation([batch], step)
        keys = self._keys.popleft()
        large, small = self.project(batch, self.projector)
        pairs = [(large[0], keys.views[1]), (large[1], keys.views[0]), *((q, key) for q in small for key in keys.views)]
        terms = [losses.momentum_contrast(self.predictor(q), k, keys.first, self.settings.temperature) for q, k in pairs]
        self.watch(large)
        return {"contrastive": 2 * torch.stack(terms).mean(), **self.repelled(small)}

    @override
    def on_step_skipped(self) -> None:
        """Discards the prepared keys."""
        super().on_step_skipped()
        self._keys.clear()

    @override
    def lr_multipliers(self) -> dict[nn.Parameter, float]:
        """The predictor's, ``method.predictor_lr_mult``."""
        return dict.fromkeys(self.predictor.parameters(), self.settings.predictor_lr_mult)


def build(config: Config, settings: Mocov3Settings) -> MoCoV3:
    """Builds MoCo v3 with a newly initialized backbone."""
    return MoCoV3(build_trunk(config.model, image_size=settings.views.global_size), settings)
