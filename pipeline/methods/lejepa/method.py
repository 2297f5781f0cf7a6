"""LeJEPA (Balestriero and LeCun, "LeJEPA: provable and scalable self-supervised learning without the heuristics", 2511.08544).

All views of an image pass one network and a projector. Each is pulled to the mean of the image's global views, and SIGReg keeps
the projections of a batch, view by view, an isotropic normal distribution, so that they cannot collapse. There is no teacher, no
predictor and no stopped gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from pipeline import losses
from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.methods.lejepa.settings import LejepaSettings
from pipeline.methods.shared.gradient_cache import Replay, replays
from pipeline.methods.shared.two_views import TwoViews
from pipeline.models.mlps import mlp
from pipeline.models.resnet import Tower, build_trunk

_DIRECTIONS = 0x516  # identifies the random draw


class LeJEPA(TwoViews):
    """LeJEPA; see the module.

    A global batch in several micro-batches is tested for normality as one, as in :mod:`~pipeline.methods.shared.contrastive`.
    Batch norms see only their micro-batch, so with them the result still differs from one large batch; ``couples_batch`` reports
    this.

    Args:
        backbone: the backbone.
        settings: head, SIGReg and views.
    """

    settings: LejepaSettings

    def __init__(self, backbone: Tower, settings: LejepaSettings) -> None:
        s = settings
        super().__init__(backbone, s, out=s.head_out)
        widths = (backbone.width, *(s.head_hidden,) * (s.head_layers - 1), s.head_out)
        self.projector = mlp(widths, norm=s.head_norm, last_bias=True)
        self.couples_batch = self.sees_batches() or not s.grad_cache
        self._replays: deque[Replay] = deque()

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Projections ``[b, out]`` of each view, the global ones first, fp32."""
        large, small = batch.views["global"], batch.views.get("local", [])
        tokens = [self.student(torch.cat(large), batch)]
        if small:
            tokens.append(self.backbone(torch.cat(small), local=True, patches="none").cls)
        projected: Tensor = self.projector(torch.cat(tokens)).float()
        return projected.chunk(len(large) + len(small))

    def sigreg(self, views: Sequence[Tensor], step: Step) -> Tensor:
        """The weighted SIGReg term of the projections ``[b, out]`` of each view."""
        s = self.settings
        directions = losses.random_directions(s.head_out, s.slices, _DIRECTIONS + step.index, views[0].device)
        return s.sigreg_weight * losses.sigreg(torch.stack(list(views)), directions, knots=s.knots, limit=s.integral_limit)

    @override
    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Computes SIGReg of all micro-batches as one batch, and its gradient with respect to each projection."""
        self._replays.clear()
        if len(batches) < 2 or not self.settings.grad_cache:
            return
        self._replays = replays(self, batches, self.features, partial(self.sigreg, step=step))

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss terms ``predict`` and ``sigreg``; with local repulsion also ``repel`` and ``judge``."""
        views, count = self.features(batch), len(batch.views["global"])
        self.watch(views)
        stacked = torch.stack(views)
        predict = (1 - self.settings.sigreg_weight) * (stacked[:count].mean(0) - stacked).square().mean()
        normality = self._replays.popleft().of(views) if self._replays else self.sigreg(views, step)
        return {"predict": predict, "sigreg": normality, **self.repelled(views[count:])}

    @override
    def on_step_skipped(self) -> None:
        """Discards the gradient cache."""
        super().on_step_skipped()
        self._replays.clear()


def build(config: Config, settings: LejepaSettings) -> LeJEPA:
    """Builds LeJEPA with a newly initialized backbone."""
    return LeJEPA(build_trunk(config.model, image_size=settings.views.global_size), settings)
