"""DetailCLIP (Monsefi et al., arXiv 2409.06809).

The EMA teacher sees two full views of each image; the student sees only the patches that the teacher's class token attends to
most. The student's class tokens are contrasted with captions (term CLIP) and predict the teacher's class tokens of the other
view (CLS). A small decoder fills the masked positions and predicts there the teacher's patch tokens of the same view (Patch)
and the pixels (Rec).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from pipeline import losses
from pipeline.config.schema import Config
from pipeline.config.sizes import square_side
from pipeline.data.augment.settings import GLOBAL_VIEWS
from pipeline.data.augment.views import Batch, ViewSpec
from pipeline.errors import ConfigError
from pipeline.methods.base import Step, kept
from pipeline.methods.detailclip.settings import DetailClipSettings
from pipeline.methods.ema_teacher import Teacher
from pipeline.methods.shared.contrastive import Contrastive, caption_tokens, unit
from pipeline.methods.shared.crops import NORMALIZE, global_augments
from pipeline.models.attention import kept_and_removed, with_attention
from pipeline.models.decoder import Decoder, patchified
from pipeline.models.heads import PrototypeHead
from pipeline.models.text import TextTower
from pipeline.models.tokens import Tokens, taken
from pipeline.models.vision import VisionTower, build_tower

PAIRINGS = {
    "cross": losses.multi_crop_pairings(0),
    "same": (losses.Pairing((0, 1), (1.0, 0.0), 1), losses.Pairing((1, 2), (0.0, 1.0), 1)),
    "both": (losses.Pairing((0, 2), (0.5, 0.5), 1),),
}


_SIZE = "method.views.global_size"


@dataclass(frozen=True)
class _BatchTargets:
    """The teacher's outputs for a micro-batch, views first.

    Attributes:
        batch: the micro-batch.
        keep, removed: int64 ``[2 * batch, ...]``, indices of the patches that are visible to and masked from the student.
        target_index: int64 ``[2 * batch, ...]``, indices of the patches in the patch loss.
        cls, patches: targets ``[2, batch]`` and ``[1, 2 * batch * targets]``.
    """

    batch: Batch
    keep: Tensor
    removed: Tensor
    target_index: Tensor
    cls: losses.Targets
    patches: losses.Targets


class DetailCLIP(Contrastive):
    """DetailCLIP; see the module.

    Args:
        backbone: the student's vision tower.
        settings: views, masking, loss weights, temperatures.
    """

    settings: DetailClipSettings

    def __init__(self, backbone: VisionTower, settings: DetailClipSettings) -> None:
        super().__init__(backbone, settings, scale=settings.init_logit_scale)
        s = settings
        self.views = detailclip_views(s)
        self.grid = square_side(s.views.global_size, where=_SIZE) // backbone.patch
        self.head = PrototypeHead(
            backbone.width, hidden=s.head_hidden, bottleneck=s.head_bottleneck, prototypes=s.prototypes, layers=s.head_layers
        )
        self.decoder = Decoder(
            backbone.width,
            grid=self.grid,
            patch=backbone.patch,
            depth=s.decoder_depth,
            heads=s.decoder_heads,
            channels=backbone.in_channels,
        )
        # Prototypes are unit vectors; masked positions use the decoder's mask token, not the tower's.
        for frozen in (self.head.last.gain, backbone.mask_token):
            if frozen is not None:
                frozen.requires_grad_(False)
        backbone.vit.patch_embed.requires_grad_(not s.freeze_patch_embed)
        text_networks = {"image_projection": self.image_projection, "text_tower": self.text_tower} if s.text_teacher else {}
        self.teacher: Teacher = Teacher(backbone=backbone, head=self.head, **text_networks)
        self.extra_state = {name: torch.zeros(s.prototypes) for name in ("cls_center", "patch_center")}
        self._mean_logits: dict[str, Tensor] = {}
        self._pending_targets: list[_BatchTargets] = []

    @torch.no_grad()
    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Runs the teacher, then, if there are several micro-batches, computes the student's features of all."""
        self._clear_step_state()
        backbone, head = cast(VisionTower, self.teacher.modules["backbone"]), cast(PrototypeHead, self.teacher.modules["head"])
        s, seen, sums, rows = self.settings, [], [], [0, 0]
        for batch in batches:
            tokens = with_attention(backbone, self._shrunk(torch.cat(batch.views["global"])), layers=s.aggregation)
            assert tokens.attention is not None
            attention = losses.resampled_patches(tokens.attention[..., None], self.grid)[..., 0]
            seen_patches = losses.resampled_patches(tokens.patches, self.grid)
            keep, removed = kept_and_removed(
                attention, self.grid, s.keep_ratio, cells=s.mask_unit == "cells", plus_one=s.keep_count == "plus_one"
            )
            target_index = (
                removed
                if s.patch_positions == "removed"
                else torch.arange(self.grid**2, device=keep.device).expand(len(keep), -1)
            )
            cls, patches = head.units(tokens.cls), head.units(seen_patches)
            centred = patches if s.center_over == "all" else taken(patches, removed)
            sums.append(torch.stack([cls.float().sum(0), centred.float().sum((0, 1))]))
            rows = [rows[0] + len(cls), rows[1] + centred.shape[0] * centred.shape[1]]
            seen.append((batch, keep, removed, target_index, cls, taken(patches, target_index).flatten(0, 1)))
        matrix = head.matrix(seen[0][4].dtype)
        for name, total, count in zip(self.extra_state, torch.stack(sums).sum(0), rows, strict=True):
            with torch.autocast(
                total.device.type, enabled=False
            ):  # logits are linear in features, so the mean of logits is the logit of the mean feature
                self._mean_logits[name] = matrix.float() @ losses.global_mean(total, count)
        temperatures = (s.cls_temperature, step.teacher_temperature)
        shift = [-center / temperature for center, temperature in zip(self.extra_state.values(), temperatures, strict=True)]
        for batch, keep, removed, target_index, cls, patches in seen:
            cls_targets = losses.Targets(cls.unflatten(0, (2, -1)), matrix, shift[0], s.cls_temperature)
            patch_targets = losses.Targets(patches[None], matrix, shift[1], step.teacher_temperature)
            self._pending_targets.append(_BatchTargets(batch, keep, removed, target_index, cls_targets, patch_targets))
        super().before_accumulation(batches, step)

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss terms ``clip``, ``cls``, ``patch`` and ``rec``."""
        if not self._pending_targets or self._pending_targets[0].batch is not batch:
            self.before_accumulation([batch], step)
        s, known = self.settings, self._pending_targets[0]
        tokens, features = self._student(batch)
        clip = self.contrast(features)
        self._pending_targets.pop(0)
        target_index, pixels = self.decoder(tokens, known.removed, everywhere=s.patch_positions == "all")
        views, samples = len(tokens.cls), len(tokens.cls) // 2
        target_index = target_index.flatten(0, 1)
        cross_entropy = partial(losses.prototype_cross_entropy, temperature=s.student_temperature, rows=s.prototype_chunk_size)

        def compare(units: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
            weight = units.new_full((samples,), 1 / views, dtype=torch.float32)
            cls, statistics = cross_entropy(
                units[:views].unflatten(0, (2, -1)), matrix, known.cls, PAIRINGS[s.cls_pairing], weight, watch=True
            )
            weight = units.new_full((len(target_index),), 1 / len(target_index), dtype=torch.float32)
            patch, _ = cross_entropy(units[None, views:], matrix, known.patches, losses.SAME_VIEW, weight)
            return cls[1], patch[0], *(statistics or ())

        cls, patch, entropy, target_sum, _ = self.head(torch.cat([tokens.cls, target_index.to(tokens.cls.dtype)]), compare)
        targets = taken(
            patchified(torch.cat(batch.views["global"]), self.backbone.patch, standardise=s.norm_pix_loss), known.removed
        )
        rec = (pixels.float() - targets).square().mean()
        mean_target = target_sum / views
        uniform = target_sum.new_full((), len(target_sum)).log()
        self.metrics |= {
            "target_entropy": entropy / views / uniform,
            "prototype_entropy": -torch.xlogy(mean_target, mean_target).sum() / uniform,
        }
        return {
            "clip": s.clip_weight * clip,
            "cls": s.cls_weight * cls,
            "patch": s.patch_weight * patch,
            "rec": s.reconstruction_weight * rec,
        }

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """L2-normalized features of both views as the student sees them, and of the captions."""
        return self._student(batch)[1]

    def compare(self, features: Sequence[Tensor], scale: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mean over the views of CLIP's loss."""
        first, second, texts = features
        compared = partial(losses.clip_loss, chunk=self.settings.logit_chunk_size)
        return (compared(first, texts, scale) + compared(second, texts, scale)) / 2

    def after_step(self, step: Step, applied: Tensor | None = None) -> None:
        """Updates the teacher, and the centres with the mean of its outputs in this step."""
        super().after_step(step, applied)
        for name, mean in self._mean_logits.items():
            old = self.extra_state[name]
            self.extra_state[name] = kept(applied, losses.moved_center(old, mean, self.settings.center_momentum), old)
        self._clear_step_state()

    def on_step_skipped(self) -> None:
        """Discards the skipped batch, whose means may not be finite."""
        super().on_step_skipped()
        self._clear_step_state()

    def export(self) -> dict[str, nn.Module]:
        """Both towers and the image projection: the teacher's, or the student's if the text tower has no EMA teacher."""
        if not self.settings.text_teacher:
            return super().export()
        slow = self.teacher.modules
        return {"backbone": slow["backbone"], "image_projection": slow["image_projection"], "text": slow["text_tower"]}

    def encode_images(self, images: Tensor) -> Tensor:
        """Features ``[batch, embed]`` of full images by the exported towers, not normalized."""
        towers = self.export()
        features: Tensor = towers["image_projection"](towers["backbone"](images).cls)
        return features

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Features ``[batch, embed]`` of captions by the exported tower, not normalized."""
        return cast(TextTower, self.export()["text"])(tokens)

    def _student(self, batch: Batch) -> tuple[Tokens, tuple[Tensor, ...]]:
        known = next(p for p in self._pending_targets if p.batch is batch)
        tokens = self.backbone(torch.cat(batch.views["global"]), keep=known.keep)
        first, second = unit(self.image_projection(tokens.cls)).chunk(2)
        return tokens, (first, second, unit(self.text_tower(caption_tokens(batch))))

    def _shrunk(self, images: Tensor) -> Tensor:
        """The teacher's input: views, downscaled if ``teacher_size`` is set."""
        side = self.settings.teacher_size
        if side in (None, images.shape[-1]):
            return images
        return nn.functional.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)

    def _clear_step_state(self) -> None:
        """Discards targets and mean logits of the step."""
        self._mean_logits, self._pending_targets = {}, []


def detailclip_views(settings: DetailClipSettings) -> tuple[ViewSpec, ...]:
    """Two views of each image, by default with the same augmentation."""
    v, a = settings.views, settings.augment
    augments = global_augments(a, blur_kernel="auto")
    return (
        ViewSpec(
            "global",
            GLOBAL_VIEWS,
            v.global_size,
            v.global_scale,
            augments,
            normalize=NORMALIZE[a.normalize],
            interpolation=v.interpolation,
        ),
    )


def build(config: Config, settings: DetailClipSettings) -> DetailCLIP:
    """Builds DetailCLIP with newly initialized towers.

    Raises:
        ConfigError: the teacher's view size is not a multiple of the patch size, or exceeds the student's.
    """
    tower = build_tower(config.model, image_size=settings.views.global_size)
    own = square_side(settings.views.global_size, where=_SIZE)
    side = settings.teacher_size or own
    if side % tower.patch or side > own:
        raise ConfigError(
            f"the teacher cannot see {side} pixels: patches have {tower.patch}, the student's views {settings.views.global_size}",
            where="method.teacher_size",
            hint=f"Choose a multiple of {tower.patch} up to {settings.views.global_size}, or null",
        )
    return DetailCLIP(tower, settings)
