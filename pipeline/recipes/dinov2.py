"""DINOv2 (Oquab et al., "Learning robust visual features without supervision", arXiv 2304.07193).

The student sees two global crops, half of them with hidden patches, and several local crops. The teacher, its slow copy,
sees the two global crops whole. The student's class tokens predict the teacher's of the *other* crops (DINO), its mask
tokens predict the teacher's patches in the *same* crop (iBOT), and KoLeo keeps the class tokens of a batch apart.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline import losses
from pipeline.data.views import Augment, Batch, MaskSpec, ViewSpec
from pipeline.methods import AugmentSettings, Dinov2Settings
from pipeline.models.groups import ParameterGroup, parameter_groups
from pipeline.models.heads import PrototypeHead
from pipeline.models.vision import VisionTower, build_tower
from pipeline.recipes.base import Recipe, Step
from pipeline.recipes.teacher import Teacher
from pipeline.settings import Config

# Probability of blur for the first global, the second global and the local crops. The public weights were trained with the
# first row (the code's blur wrapper inverted its argument); the paper's text means the second.
BLUR = {"as_released": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5), "off": (0.0, 0.0, 0.0)}


class DINOv2(Recipe):
    """The method; see the module.

    Args:
        backbone: the student's tower.
        settings: weights, temperatures, heads and views.
    """

    batch_coupled = True

    def __init__(self, backbone: VisionTower, settings: Dinov2Settings) -> None:
        super().__init__()
        self.settings = settings
        self.views = dinov2_views(settings, patch=backbone.patch)
        self.backbone = backbone
        self.dino_head = _head(backbone.width, settings)
        self.ibot_head = None if settings.shared_heads else _head(backbone.width, settings)
        heads = {"dino_head": self.dino_head} | ({"ibot_head": self.ibot_head} if self.ibot_head is not None else {})
        self.teacher: Teacher = Teacher(backbone=backbone, **heads)
        if settings.targets == "centering":
            self.memory = {name: torch.zeros(settings.prototypes) for name in ("dino_center", "ibot_center")}
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms ``dino_local``, ``dino_global``, ``ibot`` and ``koleo``."""
        s = self.settings
        globals_ = torch.cat(batch.views["global"])
        crops, masks = len(globals_), batch.masks["global"]
        dino_targets, ibot_targets = self._targets(globals_, masks.index, step.teacher_temperature)

        seen = self.backbone(globals_, masks.grid)
        cls = [seen.cls]
        if batch.views.get("local"):
            cls.append(self.backbone(torch.cat(batch.views["local"])).cls)
        hidden = seen.patches.flatten(0, 1)[masks.index]
        logits, patch_logits = _both(self.dino_head, self.ibot_head, torch.cat(cls), hidden)
        student_global = logits[:crops].unflatten(0, (2, -1))
        student_local = logits[crops:].unflatten(0, (-1, crops // 2))

        local, glob = losses.multi_crop(student_global, student_local, dino_targets, s.student_temperature)
        ibot = losses.masked_patches(patch_logits, ibot_targets, masks.weight, crops, s.student_temperature)
        koleo = sum((losses.koleo(view) for view in seen.cls.chunk(2)), start=cls[0].new_zeros((), dtype=torch.float32))
        self._watch(student_global, dino_targets, local + glob)
        return {
            "dino_local": s.dino_weight * local,
            "dino_global": s.dino_weight * glob,
            "ibot": s.ibot_weight * ibot,
            "koleo": s.koleo_weight * koleo,
        }

    def after_step(self, step: Step) -> None:
        """Moves the teacher, and the centres by the mean of what the teacher said since the last step."""
        super().after_step(step)
        if self._seen:
            means = (torch.stack(seen).mean(0) for seen in zip(*self._seen, strict=True))
            for name, mean in zip(("dino_center", "ibot_center"), means, strict=True):
                self.memory[name] = losses.moved_center(self.memory[name], mean, self.settings.center_momentum)
            self._seen.clear()

    def after_skip(self) -> None:
        """Forgets the skipped batch: its means may not be finite."""
        self._seen.clear()

    def parameter_groups(self) -> list[ParameterGroup]:
        """Layer-wise learning rates in the tower, the prototype layers marked, vectors without weight decay."""
        return parameter_groups(self, layer_decay=self.settings.layer_decay, patch_lr=self.settings.patch_embed_lr_scale)

    def export(self) -> dict[str, nn.Module]:
        """The teacher's tower, as ``backbone``."""
        return {"backbone": self.teacher.modules["backbone"]}

    @torch.no_grad()
    def _targets(self, globals_: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        nets = self.teacher.modules
        tokens = nets["backbone"](globals_)
        hidden = tokens.patches.flatten(0, 1)[index]
        cls_logits, patch_logits = _both(nets["dino_head"], nets.get("ibot_head"), tokens.cls, hidden)
        if self.settings.targets == "sinkhorn":
            rounds = self.settings.sinkhorn_iterations
            dino = losses.sinkhorn(cls_logits, temperature, rounds)
            return dino.unflatten(0, (2, -1)), losses.sinkhorn(patch_logits, temperature, rounds)
        self._seen.append((losses.batch_center(cls_logits), losses.batch_center(patch_logits)))
        dino = losses.centered_targets(cls_logits, self.memory["dino_center"], temperature)
        return dino.unflatten(0, (2, -1)), losses.centered_targets(patch_logits, self.memory["ibot_center"], temperature)

    @torch.no_grad()
    def _watch(self, student_global: Tensor, targets: Tensor, dino: Tensor) -> None:
        """Signs of collapse: a loss of ln K (everything alike) or an entropy of 0 in the mean target (one prototype)."""
        uniform = math.log(self.settings.prototypes)
        mean_target = targets.flatten(0, 1).mean(0)
        agree = student_global.argmax(-1) == targets.flip(0).argmax(-1)
        self.metrics = {
            "target_entropy": -torch.xlogy(targets, targets).sum(-1).mean() / uniform,
            "prototype_use": -torch.xlogy(mean_target, mean_target).sum() / uniform,
            "dino_below_uniform": uniform - dino.detach(),
            "agreement": agree.float().mean(),
        }


def build(config: Config, settings: Dinov2Settings) -> DINOv2:
    """The method around a fresh tower."""
    return DINOv2(build_tower(config.model, image_size=settings.views.global_size), settings)


def dinov2_views(settings: Dinov2Settings, *, patch: int) -> tuple[ViewSpec, ...]:
    """The two global and the local crops of the paper, with block masks on the global ones.

    Args:
        settings: sizes, scales and probabilities.
        patch: patch side of the tower, pixels.
    """
    v, a = settings.views, settings.augment
    blur = BLUR[a.blur]
    first = replace(_augment(a), blur_p=blur[0])
    second = replace(first, blur_p=blur[1], solarize_p=a.solarize_probability)
    mask = MaskSpec(patch, settings.mask_probability, settings.mask_ratio)
    views = [ViewSpec("global", v.global_count, v.global_size, v.global_scale, (first, second), mask=mask)]
    if v.local_count:
        views.append(ViewSpec("local", v.local_count, v.local_size, v.local_scale, (replace(first, blur_p=blur[2]),)))
    return tuple(views)


def _augment(a: AugmentSettings) -> Augment:
    return Augment(
        flip_p=a.flip_probability,
        jitter_p=a.jitter_probability,
        brightness=a.brightness,
        contrast=a.contrast,
        saturation=a.saturation,
        hue=a.hue_shift if a.hue != "off" else 0.0,
        gray_p=a.gray_probability,
    )


def _head(width: int, s: Dinov2Settings) -> PrototypeHead:
    return PrototypeHead(
        width,
        hidden=s.head_hidden,
        bottleneck=s.head_bottleneck,
        prototypes=s.prototypes,
        layers=s.head_layers,
        weight_norm=s.head_norm == "weight_norm",
    )


def _both(dino: nn.Module, ibot: nn.Module | None, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of class tokens and of patches; one call where the head is shared."""
    if ibot is not None:
        return dino(cls), ibot(patches)
    logits = dino(torch.cat([cls, patches]))
    return logits[: len(cls)], logits[len(cls) :]
