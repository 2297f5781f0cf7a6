"""SimCLR (Chen et al., "A simple framework for contrastive learning of visual representations", arXiv 2002.05709).

Two views of each image, with the same augmentation, pass one network and a projector. Each view is contrasted with all views
of the global batch; its positive is the image's other view. There is no teacher. Negatives come only from the batch, so
batches are large and are trained with LARS.

The colour jitter's operations have a fixed order; in the paper it is random.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from pipeline import losses
from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.methods.shared.gradient_cache import Replay, replays
from pipeline.methods.shared.two_views import TwoViews
from pipeline.methods.simclr.settings import SimclrSettings
from pipeline.models.mlps import mlp
from pipeline.models.resnet import Tower, build_trunk


class SimCLR(TwoViews):
    """SimCLR; see the module.

    A global batch in several micro-batches is contrasted as one, as in :mod:`~pipeline.methods.shared.contrastive`. Batch
    norms see only their micro-batch, so with them the result still differs from one large batch; ``couples_batch`` reports
    this.

    Args:
        backbone: the backbone.
        settings: head, temperature and views.
        init: initialization of the projector, see :func:`pipeline.models.mlps.mlp`.
    """

    settings: SimclrSettings

    def __init__(self, backbone: Tower, settings: SimclrSettings, *, init: Literal["torch", "simclr"] = "torch") -> None:
        s = settings
        super().__init__(backbone, s, out=s.head_out)
        widths = (backbone.width, *(s.head_hidden or backbone.width,) * (s.head_layers - 1), s.head_out)
        self.projector = mlp(widths, norm=s.head_norm, last="norm", init=init)
        self.couples_batch = self.sees_batches() or not s.grad_cache
        self._replays: deque[Replay] = deque()

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Projections ``[b, out]`` of the two views, fp32; in one forward pass, so that batch norm sees both, or one for each."""
        if self.settings.batch_norm_per_view:
            first, second = (view.float() for view in self.project(batch, self.projector)[0])
            return first, second
        both = self.projector(self.student(torch.cat(batch.views["global"]), batch)).float()
        first, second = both.chunk(2)
        return first, second

    @override
    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Computes the loss of all micro-batches as one batch, and its gradient with respect to each projection."""
        self._replays.clear()
        if len(batches) < 2 or not self.settings.grad_cache:
            return
        self._replays = replays(self, batches, self.features, self._contrast)

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss term ``contrastive``."""
        views = self.features(batch)
        self.watch(views)
        if not self._replays:
            return {"contrastive": self._contrast(views)}
        return {"contrastive": self._replays.popleft().of(views)}

    def _contrast(self, views: Sequence[Tensor]) -> Tensor:
        return losses.nt_xent(views[0], views[1], self.settings.temperature)

    @override
    def on_step_skipped(self) -> None:
        """Discards the gradient cache."""
        super().on_step_skipped()
        self._replays.clear()


def build(config: Config, settings: SimclrSettings) -> SimCLR:
    """Builds SimCLR with a newly initialized backbone."""
    trunk = build_trunk(config.model, image_size=settings.views.global_size)
    return SimCLR(trunk, settings, init="simclr" if config.model.init == "simclr" else "torch")
