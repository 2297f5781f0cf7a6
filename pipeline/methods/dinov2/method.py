"""DINOv2 (Oquab et al., "Learning robust visual features without supervision", arXiv 2304.07193).

The student sees two global crops, half of them with masked patches, and several local crops. The EMA teacher sees the two
global crops unmasked. The student's class tokens predict the teacher's of the *other* crops (DINO), its mask tokens predict
the teacher's patch tokens in the *same* crop (iBOT), and KoLeo spreads the class tokens of a batch.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from pipeline import losses
from pipeline.config.schema import Config
from pipeline.config.sizes import square_side
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.settings import GLOBAL_VIEWS
from pipeline.data.augment.views import Batch, Masks, MaskSpec, ViewSet, ViewSpec
from pipeline.data.channel_settings import ChannelSettings
from pipeline.errors import ConfigError
from pipeline.methods.base import Method, Step, kept
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.health_metrics import distillation_health
from pipeline.methods.shared.crops import multi_crop, view_stages
from pipeline.methods.shared.frozen import Frozen
from pipeline.models.groups import ParameterGroup, parameter_groups
from pipeline.models.heads import PrototypeHead
from pipeline.models.vision import VisionTower, build_tower


@dataclass(frozen=True)
class _BatchTargets:
    """The teacher's outputs for a micro-batch."""

    batch: Batch
    dino: losses.Targets
    ibot: losses.Targets


class DINOv2(Method):
    """DINOv2; see the module.

    The targets depend on the whole global batch through Sinkhorn-Knopp or the centre. Therefore the teacher processes all
    micro-batches before the student's first forward pass and keeps only the heads' bottleneck features; logits are computed in
    chunks.

    Args:
        backbone: the student's backbone.
        settings: loss weights, temperatures, heads and views.
    """

    def __init__(self, backbone: VisionTower, settings: Dinov2Settings) -> None:
        super().__init__()
        self.settings = settings
        self.couples_batch = (
            settings.koleo_weight > 0 and settings.koleo_group_size is None
        ) or settings.target_batch == "micro"  # all other terms are exact under accumulation, see before_accumulation
        self.views = dinov2_views(settings, patch=backbone.patch)
        self.curriculum = view_stages(settings, partial(dinov2_views, patch=backbone.patch))
        self._sets = tuple(ViewSet(dinov2_views(settings.at(r), patch=backbone.patch), r.weight) for r in settings.resolutions)
        self.backbone = backbone
        self.dino_head = prototype_head(backbone.width, settings)
        self.ibot_head = None if settings.shared_heads else prototype_head(backbone.width, settings, ibot=True)
        heads = {"dino_head": self.dino_head} | ({"ibot_head": self.ibot_head} if self.ibot_head is not None else {})
        self.teacher: Teacher = Teacher(backbone=backbone, **heads)
        if settings.centering == "softmax_center":
            self.extra_state = {
                "dino_center": torch.zeros(settings.prototypes),
                "ibot_center": torch.zeros(_patch_prototypes(settings)),
            }
        self.gram = Frozen(backbone=copy.deepcopy(backbone)) if settings.gram_weight else None
        self.health_metrics = distillation_health(
            settings.prototypes,
            settings.student_temperature,
            centred=settings.centering == "softmax_center",
            center_momentum=settings.center_momentum,
            koleo=settings.koleo_weight,
        )
        self._mean_logits: dict[str, Tensor] = {}
        self._pending_targets: deque[_BatchTargets] = deque()
        self._metric_sums: dict[str, Tensor] = {}
        self._feature_rank = torch.zeros(())

    @property
    @override
    def view_sets(self) -> tuple[ViewSet, ...]:
        """One set of views for each of the settings' resolutions."""
        return self._sets or super().view_sets

    @override
    def of_channels(self, settings: ChannelSettings | None) -> Self:
        """Also those of all resolutions."""
        self._sets = tuple(replace(one, views=tuple(v.of_channels(settings) for v in one.views)) for one in self._sets)
        return super().of_channels(settings)

    @torch.no_grad()
    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Runs the teacher on all micro-batches, then computes the potentials that turn its logits into targets."""
        self._clear_step_state()
        if self.settings.target_batch == "global":
            self._prepare(batches, step)

    @torch.no_grad()
    def _prepare(self, batches: Sequence[Batch], step: Step) -> None:
        """Targets of the micro-batches, which are determined together."""
        backbone, *heads = self.target_networks().values()
        dino_head, ibot_head = cast(PrototypeHead, heads[0]), cast(PrototypeHead, heads[-1])  # the same head if shared
        features, cls, patches = [], [], []
        for batch in batches:
            masks = batch.masks["global"]
            tokens = backbone(torch.cat(batch.views["global"]), patches=masks.index, capacity=masks.capacity)
            features.append(tokens.cls[: len(tokens.cls) // 2])
            cls.append(dino_head.units(tokens.cls))
            patches.append(ibot_head.units(tokens.patches))
        self._feature_rank = losses.effective_rank(torch.cat(features))
        dino_matrix = dino_head.matrix(cls[0].dtype)
        ibot_matrix = dino_matrix if ibot_head is dino_head else ibot_head.matrix(cls[0].dtype)
        temperature = step.teacher_temperature
        dino = self._potential("dino_center", cls, dino_matrix, temperature)
        ibot = self._potential("ibot_center", patches, ibot_matrix, temperature)
        for batch, c, p in zip(batches, cls, patches, strict=True):
            dino_targets = losses.Targets(c.unflatten(0, (2, -1)), dino_matrix, dino, temperature)
            ibot_targets = losses.Targets(p[None], ibot_matrix, ibot, temperature)
            self._pending_targets.append(_BatchTargets(batch, dino_targets, ibot_targets))

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss terms ``dino_local``, ``dino_global``, ``ibot`` and ``koleo``; with a Gram anchor also ``gram``."""
        if not self._pending_targets or self._pending_targets[0].batch is not batch:
            (self.before_accumulation if self.settings.target_batch == "global" else self._prepare)([batch], step)
        s, targets, masks = self.settings, self._pending_targets.popleft(), batch.masks["global"]
        global_crops = torch.cat(batch.views["global"])  # [2 * batch, 3, height, width]
        global_tokens = self.backbone(
            global_crops,
            self.student_mask(masks),
            patches=masks.index if self.gram is None else "all",
            capacity=masks.capacity,
        )  # cls [2 * batch, width]; patches [masked, width], or all [2 * batch, patches, width]
        num_global_crops, batch_size = len(global_tokens.cls), len(global_tokens.cls) // 2
        cls = [global_tokens.cls]
        if batch.views.get("local"):
            cls.append(self.backbone(torch.cat(batch.views["local"]), local=True, patches="none").cls)
        pairings = losses.multi_crop_pairings(len(batch.views.get("local", ())))
        # DINO's loss is the mean over all pairs of a student crop and a target crop, then over the samples.
        num_pairs = sum(sum(p.targets) * (p.views[1] - p.views[0]) for p in pairings)
        row_weight = global_tokens.cls.new_full((batch_size,), 1 / (batch_size * num_pairs))

        cross_entropy = partial(losses.prototype_cross_entropy, temperature=s.student_temperature, rows=s.prototype_chunk_size)

        # The losses run inside the head's forward pass: under ZeRO 3 its prototypes are gathered only there.
        def dino(unit: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
            crop_major = unit.unflatten(0, (-1, batch_size))
            terms, statistics = cross_entropy(crop_major, matrix, targets.dino, pairings, row_weight, watch=True)
            return terms, *(statistics or ())

        def ibot(unit: Tensor, matrix: Tensor) -> Tensor:
            return cross_entropy(unit[None], matrix, targets.ibot, losses.SAME_VIEW, masks.weight / num_global_crops)[0]

        cls_tokens = torch.cat(cls)  # [(2 + local) * batch, width]
        patches = global_tokens.patches
        masked_patches = patches if self.gram is None else patches.flatten(0, 1)[masks.index]  # [masked, width]
        if self.ibot_head is not None:
            (local_loss, global_loss), *statistics = self.dino_head(cls_tokens, dino)
            (ibot_loss,) = self.ibot_head(masked_patches, ibot)
        else:
            n, both = len(cls_tokens), torch.cat([cls_tokens, masked_patches])
            (local_loss, global_loss), *statistics, (ibot_loss,) = self.dino_head(
                both, lambda u, m: (*dino(u[:n], m), ibot(u[n:], m))
            )
        self._record_metrics(batch, targets, (local_loss + global_loss).detach(), losses.TargetStatistics(*statistics))
        terms = {
            "dino_local": s.dino_weight * s.local_weight * local_loss,
            "dino_global": s.dino_weight * global_loss,
            "ibot": s.ibot_weight * ibot_loss,
            "koleo": s.koleo_weight * (self._koleo(global_tokens.cls[:batch_size]) + self._koleo(global_tokens.cls[batch_size:])),
        }
        if self.gram is not None:
            with torch.no_grad():
                anchor = self.gram["backbone"](torch.cat(batch.views.get("gram", batch.views["global"]))).patches
                if "gram" in batch.views:  # of another size, and square like the global crops
                    anchor = losses.resampled_patches(anchor, math.isqrt(patches.shape[1]))  # [2 * batch, patches, width]
            terms["gram"] = s.gram_weight * losses.gram(patches, anchor)
        return terms

    def copy_targets(self, source: DINOv2) -> None:
        """Takes over the targets that another instance has computed, over the same prototypes."""
        self._pending_targets, self._feature_rank = deque(source._pending_targets), source._feature_rank

    def target_networks(self) -> Mapping[str, nn.Module]:
        """The networks that produce the targets: a backbone and its heads."""
        return self.teacher.modules

    def student_mask(self, masks: Masks) -> Tensor | None:
        """Patches of the global crops that are masked from the student, bool ``[crops, patches]``; ``None`` for none.

        Distill overrides this: its student sees unmasked crops and predicts the patches in ``masks``.
        """
        return masks.grid

    def after_step(self, step: Step, applied: Tensor | None = None) -> None:
        """Updates the teacher, the centres with the mean of the teacher's logits since the last step, and, every
        ``gram_update_every`` steps, the Gram anchor with the teacher's weights.
        """
        super().after_step(step, applied)
        if self.gram is not None and self.settings.gram_update_every:
            times, rest = divmod(step.index + 1, self.settings.gram_update_every)
            if rest == 0 and times <= self.settings.gram_max_updates:
                self._refresh(self.gram["backbone"], applied)
        for name, mean in self._mean_logits.items():
            old = self.extra_state[name]
            self.extra_state[name] = kept(applied, losses.moved_center(old, mean, self.settings.center_momentum), old)
        self._clear_step_state()

    def on_step_skipped(self) -> None:
        """Discards the skipped batch, whose means may not be finite."""
        super().on_step_skipped()
        self._clear_step_state()

    def parameter_groups(self) -> list[ParameterGroup]:
        """Groups with layer-wise learning rates in the backbone, marked prototype layers, and no weight decay on vectors."""
        return parameter_groups(self, layer_decay=self.settings.layerwise_lr_decay, patch_lr=self.settings.patch_embed_lr_mult)

    def export(self) -> dict[str, nn.Module]:
        """The teacher's backbone, as ``backbone``."""
        return {"backbone": self.teacher.modules["backbone"]}

    @torch.no_grad()
    def _refresh(self, anchor: nn.Module, applied: Tensor | None) -> None:
        """Copies the current teacher into the anchor, shard by shard, since an engine shards both alike."""
        teacher: dict[str, Tensor] = dict(self.teacher.modules["backbone"].named_parameters())
        for name, weight in anchor.named_parameters():
            own, slow = getattr(weight, "ds_tensor", weight), getattr(teacher[name], "ds_tensor", teacher[name])
            own.copy_(kept(applied, slow, own))

    def _clear_step_state(self) -> None:
        """Discards targets, mean logits and metrics of the step."""
        self._mean_logits, self._metric_sums = {}, {}
        self._pending_targets.clear()

    def _potential(self, name: str, units: list[Tensor], matrix: Tensor, temperature: float) -> Tensor:
        """Term added to the logits to make targets: the global batch's Sinkhorn-Knopp potential, or the negative centre."""
        if self.settings.centering == "sinkhorn_knopp":
            chunks = losses.logit_chunks(units, matrix, temperature, self.settings.prototype_chunk_size)
            zeros = matrix.new_zeros(len(matrix), dtype=torch.float32)
            return losses.potential_over_chunks(chunks, zeros, self.settings.sinkhorn_iterations)
        sums = torch.stack([unit.float().sum(0) for unit in units]).sum(0)
        mean = losses.global_mean(sums, sum(map(len, units)))  # mean of features, since logits are linear in them
        with torch.autocast(mean.device.type, enabled=False):
            self._mean_logits[name] = matrix.float() @ mean
        return -self.extra_state[name] / temperature

    def _koleo(self, cls: Tensor) -> Tensor:
        s = self.settings
        spread = losses.koleo_across_ranks if s.koleo_across_ranks else losses.koleo
        try:
            return spread(cls, group=s.koleo_group_size, neighbours=s.koleo_topk)
        except ValueError as error:
            hint = f"Choose a divisor of the {len(cls)} samples of a micro-batch, or method.koleo_across_ranks=true"
            raise ConfigError(str(error), where="method.koleo_group_size", hint=hint) from error

    @torch.no_grad()
    def _record_metrics(self, batch: Batch, targets: _BatchTargets, dino: Tensor, statistics: losses.TargetStatistics) -> None:
        """Records running means over the step's micro-batches. Signs of collapse: a loss of ln K or an entropy of 1 (uniform
        targets), a mean target of one prototype, features of rank 1.
        """
        uniform, rows = math.log(self.settings.prototypes), targets.dino.unit.shape[0] * targets.dino.unit.shape[1]
        masks = batch.masks["global"]
        values = {
            "entropy": statistics.entropy / rows / uniform,
            "target": statistics.target_sum / rows,
            "agreement": statistics.top1_agreements / rows,
            "dino": dino,
            "masked": dino.new_full((), masks.index.numel() / max(masks.grid.numel(), 1)),
            "times": torch.ones_like(dino),
        }
        self._metric_sums = {name: value + self._metric_sums.get(name, 0.0) for name, value in values.items()}
        mean = {name: value / self._metric_sums["times"] for name, value in self._metric_sums.items()}
        self.metrics = {
            "target_entropy": mean["entropy"],
            "prototype_entropy": -torch.xlogy(mean["target"], mean["target"]).sum() / uniform,
            "dino_loss_vs_log_k": uniform - mean["dino"],
            "teacher_student_top1_agreement": mean["agreement"],
            "mask_ratio": mean["masked"],
            "feature_rank": self._feature_rank,
        }


def build(config: Config, settings: Dinov2Settings) -> DINOv2:
    """Builds DINOv2 with a newly initialized backbone."""
    return DINOv2(build_tower(config.model, image_size=settings.views.global_size), settings)


def dinov2_views(settings: Dinov2Settings, *, patch: int) -> tuple[ViewSpec, ...]:
    """The paper's two global and several local crops, with block masks on the global ones. If the Gram anchor uses another
    size, the global crops are repeated in that size without colour augmentation.

    Args:
        settings: sizes, scales and probabilities.
        patch: patch side of the backbone in pixels.

    Raises:
        ConfigError: the Gram anchor uses another size, and the global crops are not square.
    """
    v, a = settings.views, settings.augment
    views = multi_crop(v, a, mask=MaskSpec(patch, settings.mask_probability, settings.mask_ratio))
    side = settings.gram_size if settings.gram_weight else None
    if side is None:
        return views
    square_side(v.global_size, where="method.views.global_size")  # the anchor's features are resampled to a square grid
    plain, normalize = Augment(flip_probability=a.flip_probability), views[0].normalize
    anchored = ViewSpec(
        "gram", GLOBAL_VIEWS, side, v.global_scale, (plain,), normalize=normalize, same_as="global", interpolation=v.interpolation
    )
    return (*views, anchored)


def _patch_prototypes(s: Dinov2Settings) -> int:
    return s.prototypes if s.shared_heads else s.ibot_prototypes or s.prototypes


def prototype_head(width: int, s: Dinov2Settings, *, ibot: bool = False) -> PrototypeHead:
    """Builds a projection head: for class tokens (and patch tokens, if shared), or with ``ibot`` for patch tokens."""
    return PrototypeHead(
        width,
        hidden=(s.ibot_hidden if ibot else None) or s.head_hidden,
        bottleneck=(s.ibot_bottleneck if ibot else None) or s.head_bottleneck,
        prototypes=_patch_prototypes(s) if ibot else s.prototypes,
        layers=s.head_layers,
        weight_norm=s.head_norm == "weight_norm",
    )
