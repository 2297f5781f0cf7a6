"""BYOL (Grill et al., "Bootstrap your own latent", arXiv 2006.07733).

The student projects and predicts one view; the target is the EMA teacher's projection of the other view, which has a different
augmentation. There are no negatives. The predictor and the stop-gradient on the targets prevent collapse; the EMA teacher
stabilizes the targets.

The teacher is initialized as a copy of the student; the reference code initializes it independently.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from pipeline import losses
from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.methods.byol.settings import ByolSettings
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.shared.two_views import TwoViews
from pipeline.models.mlps import mlp
from pipeline.models.resnet import Tower, build_trunk


class BYOL(TwoViews):
    """BYOL; see the module. Local crops, if any, predict both global crops.

    Args:
        backbone: the student's backbone.
        settings: heads and views.
        init: initialization of projector and predictor, see :func:`pipeline.models.mlps.mlp`.
    """

    settings: ByolSettings

    def __init__(self, backbone: Tower, settings: ByolSettings, *, init: Literal["torch", "byol"] = "torch") -> None:
        s = settings
        super().__init__(backbone, s, out=s.head_out)
        self.projector = mlp((backbone.width, s.head_hidden, s.head_out), norm=s.head_norm, init=init)
        widths = (s.head_out, s.head_hidden, s.head_out)
        self.predictor: nn.Module = mlp(widths, norm=s.head_norm, init=init) if s.predictor else nn.Identity()
        self.teacher: Teacher = self.make_teacher(backbone=backbone, projector=self.projector)
        self.couples_batch = self.sees_batches()

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss term ``regression``, 0 to 8, the sum of both directions; with local repulsion also ``repel`` and ``judge``."""
        backbone, projector = self.teacher.modules.values()
        with torch.no_grad(), self.teacher.batch_statistics():
            targets = [projector(backbone(view, patches="none").cls) for view in batch.views["global"]]
        large, small = self.project(batch, self.projector)
        pairs = [(large[0], targets[1]), (large[1], targets[0]), *((x, target) for x in small for target in targets)]
        terms = [losses.cosine_regression(self.predictor(x), target) for x, target in pairs]
        self.watch(large)
        return {"regression": 2 * torch.stack(terms).mean(), **self.repelled(small)}

    @override
    def lr_multipliers(self) -> dict[nn.Parameter, float]:
        """The predictor's, ``method.predictor_lr_mult``."""
        return dict.fromkeys(self.predictor.parameters(), self.settings.predictor_lr_mult)


def build(config: Config, settings: ByolSettings) -> BYOL:
    """Builds BYOL with a newly initialized backbone."""
    trunk = build_trunk(config.model, image_size=settings.views.global_size)
    return BYOL(trunk, settings, init="byol" if config.model.init == "byol" else "torch")
