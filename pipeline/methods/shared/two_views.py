"""Base of two-view methods: view specifications, LoGo's local repulsion, collapse metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline import losses
from pipeline.data.augment.views import Batch, ViewSpec
from pipeline.methods.base import Method, Step
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.health_metrics import RANK_COLLAPSE, HealthMetrics
from pipeline.methods.shared.crops import multi_crop, view_stages
from pipeline.methods.shared.two_views_settings import RepelSettings, TwoViewSettings
from pipeline.models.groups import ParameterGroup, parameter_groups
from pipeline.models.mlps import PairClassifier
from pipeline.models.norms import normalises_batches
from pipeline.models.resnet import Tower
from pipeline.models.vision import VisionTower


class TwoViews(Method):
    """Base class of two-view methods.

    Args:
        backbone: the student's backbone.
        settings: crops, augmentation, heads and local repulsion.
        out: output dimension of the projector, the input of local repulsion.
    """

    def __init__(self, backbone: Tower, settings: TwoViewSettings, *, out: int) -> None:
        super().__init__()
        self.settings = settings
        patch = backbone.patch if isinstance(backbone, VisionTower) else None
        self.views, self.curriculum = two_views(settings), view_stages(settings, two_views, patch=patch)
        self.backbone = backbone
        if isinstance(backbone, VisionTower):
            backbone.mask_token.requires_grad_(False)  # used by other methods only: it never gets a gradient here
        self.repeller = Repeller(out, settings.local_repulsion) if settings.local_repulsion is not None else None
        self.health_metrics = HealthMetrics(rank="feature_rank", suggest_fix=_suggest_fix)

    def make_teacher(self, **modules: nn.Module) -> Teacher:
        """An EMA teacher of these modules, with the running statistics that are configured."""
        teacher = Teacher(**modules)
        teacher.own_statistics = self.settings.teacher_norm_statistics == "own"
        return teacher

    def sees_batches(self) -> bool:
        """Whether batch norm or local repulsion makes a sample's loss depend on the rest of its micro-batch."""
        return normalises_batches(self) or self.repeller is not None

    def watch(self, features: Sequence[Tensor]) -> None:
        """Records ``feature_rank``, a view's effective rank, and ``feature_std``, the features' spread; 1 and 0 on collapse."""
        seen = features[0].detach()
        self.metrics = {"feature_rank": losses.effective_rank(seen), "feature_std": losses.spread(seen)}

    def repelled(self, local: Sequence[Tensor]) -> dict[str, Tensor]:
        """Loss terms ``repel`` and ``judge`` of the projected local crops; empty without local repulsion."""
        return self.repeller(local) if self.repeller is not None else {}

    def project(self, batch: Batch, *heads: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Applies the heads in sequence to the student's class tokens, for each global and each local crop.

        Each view has its own forward pass, as in MoCo v3 and BYOL, so that batch norm sees one view at a time.
        """
        net = nn.Sequential(*heads)
        large: list[Tensor] = [net(self.student(view, batch, number)) for number, view in enumerate(batch.views["global"])]
        small: list[Tensor] = [net(self.backbone(view, local=True, patches="none").cls) for view in batch.views.get("local", ())]
        return large, small

    def student(self, images: Tensor, batch: Batch, view: int | None = None) -> Tensor:
        """The student's class tokens of all global views of a batch, ``[views * batch, width]``, or of one, without the patches
        that are dropped.
        """
        kept = batch.kept_patches("global", view)
        # A ResNet has no patches, and no such argument.
        tokens = self.backbone(images, patches="none") if kept is None else self.backbone(images, keep=kept, patches="none")
        cls: Tensor = tokens.cls
        return cls

    def lr_multipliers(self) -> dict[nn.Parameter, float]:
        """Learning-rate multipliers of parameters outside the backbone; 1 for all that are not in it."""
        return {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Groups with layer-wise learning rates in a transformer; vectors have no weight decay or layer-wise scaling."""
        return parameter_groups(
            self,
            layer_decay=self.settings.layerwise_lr_decay,
            patch_lr=self.settings.patch_embed_lr_mult,
            vectors=self.settings.decay_vectors,
            scales=self.lr_multipliers(),
        )

    def export(self) -> dict[str, nn.Module]:
        """The student's backbone, as ``backbone``."""
        return {"backbone": self.backbone}


class Repeller(nn.Module):
    """LoGo's repulsion (Zhang et al., "Leverage your local and global representations", CVPR 2022).

    A regressor learns to distinguish pairs of local crops of one image from pairs of two images; the encoder learns to make
    the former look like the latter. The authors alternate three optimizers; here both terms are in one loss with disjoint
    gradients: the regressor's inputs are detached, and the encoder's term does not update the regressor.

    Args:
        width: feature dimension.
        settings: weight, hidden width and noise.
    """

    def __init__(self, width: int, settings: RepelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.judge = PairClassifier(width, settings.hidden)

    def forward(self, local: Sequence[Tensor]) -> dict[str, Tensor]:
        """Loss terms of features ``[b, width]`` of two or more local crops: the first is paired with the second, and so on."""
        pairs = [(a, b) for a, b in zip(local[0::2], local[1::2], strict=False)]
        a = nn.functional.normalize(torch.cat([first for first, _ in pairs]).float(), dim=1)
        b = nn.functional.normalize(torch.cat([second for _, second in pairs]).float(), dim=1)
        repel = (self.judge(a, b, frozen=True), self.judge(b, a, frozen=True))
        a, b, other = a.detach(), b.detach(), self._others(pairs)
        noisy = [x + self.settings.noise * x.shape[1] ** -0.5 * torch.randn_like(x) if self.settings.noise else x for x in (a, b)]
        same = torch.cat([self.judge(*noisy), self.judge(*noisy[::-1])])
        different = torch.cat([self.judge(a, other), self.judge(other, a)])
        return {"repel": self.settings.weight * losses.repulsion(torch.cat(repel)), "judge": losses.same_or_not(same, different)}

    @torch.no_grad()
    def _others(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """For each pair, the second crop of the next image in the micro-batches of all ranks."""
        negatives = []
        for _, second in pairs:
            everyone = losses.gathered(second.detach())
            next_ = (losses.rank_offset(len(second)) + 1 + torch.arange(len(second), device=second.device)) % len(everyone)
            negatives.append(everyone[next_])
        return nn.functional.normalize(torch.cat(negatives).float(), dim=1)


def two_views(settings: TwoViewSettings) -> tuple[ViewSpec, ...]:
    """Two global crops, each with its augmentation, and local crops if ``local_count`` is set."""
    return multi_crop(settings.views, settings.augment, blur_kernel=_blur_kernel)


def _blur_kernel(size: int) -> int:
    """Blur kernel size: a tenth of the view, odd."""
    return max(size // 10 | 1, 3)


def _suggest_fix(failure_mode: str, step: Step) -> str:
    if failure_mode == RANK_COLLAPSE:
        return (
            f"all images look alike to the network (learning rate {step.lr:.2g}): lower schedule.lr.peak or lengthen "
            "schedule.lr.warmup; a method without negatives also needs its predictor and a teacher that follows the student"
        )
    return f"the steps are too large (learning rate {step.lr:.2g}): lower schedule.lr.peak, or lengthen schedule.lr.warmup"
