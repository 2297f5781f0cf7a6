"""FLOPs per sample by formula, compared with torch's FLOP counter."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.config.sizes import Size, grid_of
from pipeline.data.augment.settings import GLOBAL_VIEWS
from pipeline.estimate import flops
from pipeline.methods.clip.settings import ClipSettings
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.models.settings import ModelSettings


@dataclass(frozen=True)
class Cost:
    """GFLOP of one sample in one step.

    Attributes:
        name: config name.
        counted: by torch's counter.
        formula: by formula, ``None`` if there is none for the method or the tower.
    """

    name: str
    counted: float
    formula: float | None

    @property
    def apart(self) -> float | None:
        """Relative difference of the two."""
        return None if self.formula is None else self.formula / self.counted - 1


_TIMM = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24), "huge": (1280, 32)}


def cost(name: str, config: Config) -> Cost:
    """Both figures for a config."""
    expected = formula(config)
    return Cost(name, flops.counted(config) / 1e9, None if expected is None else expected / 1e9)


def formula(config: Config) -> float | None:
    """FLOPs of one sample in one step by formula; ``None`` for methods and towers without one."""
    method = config.method
    if type(method) is Dinov2Settings:
        return _dinov2(config.model, method)
    if isinstance(method, ClipSettings) and method.image_pool == "class_token" and not method.freeze:
        return _clip(config.model, method)
    return None


def _shape(model: ModelSettings) -> tuple[int, int, int, bool, int | None] | None:
    """Width, depth, patch size, gating and hidden width of a standard ViT."""
    patch = model.patch_side
    if patch is None or model.stem != "patch":
        return None
    if model.timm_name:
        size = re.match(r"vit_(tiny|small|base|large|huge)_patch", model.timm_name)
        return (*_TIMM[size[1]], patch, False, None) if size else None
    if model.embed_dim is None or model.depth is None:
        return None
    gated = model.ffn == "swiglu"
    hidden = flops.swiglu_hidden(model.embed_dim, model.mlp_ratio) if gated else int(model.embed_dim * model.mlp_ratio)
    return model.embed_dim, model.depth, patch, gated, hidden


def _dinov2(model: ModelSettings, s: Dinov2Settings) -> float | None:
    if s.resolutions:
        each = [_dinov2(model, s.at(r)) for r in s.resolutions]
        return sum(r.weight * (one or 0) for r, one in zip(s.resolutions, each, strict=True)) / sum(
            r.weight for r in s.resolutions
        )
    shape = _shape(model)
    if shape is None:
        return None
    width, depth, patch, gated, hidden = shape
    prefix = 1 + model.registers
    keep = 1 - model.drop_path if model.batched_drop_path else 1.0

    def forward(size: Size, read: float | None = None) -> float:
        return flops.tower(size, patch, width, depth, prefix=prefix, gated=gated, hidden=hidden, read=read)

    v = s.views
    hidden_patches = GLOBAL_VIEWS * s.mask_probability * sum(s.mask_ratio) / 2 * _patches(v.global_size, patch)
    read = 1 + hidden_patches / GLOBAL_VIEWS
    teacher = GLOBAL_VIEWS * forward(v.global_size, read)
    seen = GLOBAL_VIEWS * forward(v.global_size, None if s.gram_weight else read)
    student = 3 * keep * (seen + v.local_count * forward(v.local_size, 1))
    head = flops.prototype_head(width, s.head_hidden, s.head_bottleneck, s.prototypes, s.head_layers)
    logits = 2.0 * s.head_bottleneck * s.prototypes
    crops = GLOBAL_VIEWS + v.local_count
    # The teacher's logits are computed for Sinkhorn and again beside the student's; large batches recompute them in each
    # iteration.
    again = logits if s.centering == "sinkhorn_knopp" else 0.0
    teacher_tokens, student_tokens = GLOBAL_VIEWS + hidden_patches, crops + hidden_patches
    anchor = GLOBAL_VIEWS * forward(s.gram_size or v.global_size) if s.gram_weight else 0.0
    return anchor + teacher + student + teacher_tokens * (head + again) + 3 * student_tokens * head


def _patches(size: Size, patch: int) -> int:
    return math.prod(grid_of(size, patch))


def _clip(model: ModelSettings, s: ClipSettings) -> float | None:
    shape = _shape(model)
    if shape is None:
        return None
    width, depth, patch, gated, hidden = shape
    kept = 1 - s.patch_dropout
    patches = int(_patches(s.views.global_size, patch) * kept)
    image = (depth - 1) * flops.block(patches + 1, width, hidden=hidden, gated=gated)
    image += flops.block(patches + 1, width, hidden=hidden, gated=gated, read=1)
    image += 2.0 * _patches(s.views.global_size, patch) * 3 * patch**2 * width
    text = flops.text_tower(s.text.context_length, s.text.sizes.width, s.text.sizes.depth, s.embed_dim or s.text.sizes.embed)
    return 3 * (image + text)


def markdown(costs: list[Cost], machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    lines = ["# FLOPs of a sample", "", f"`{command}`", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["| config | GFLOP counted | by formula | difference |", "|---|---:|---:|---:|"]
    for one in costs:
        predicted = ("", "") if one.formula is None else (f"{one.formula:,.1f}", f"{one.apart:+.1%}")
        lines.append(f"| {one.name} | {one.counted:,.1f} | {predicted[0]} | {predicted[1]} |")
    return "\n".join(lines) + "\n"
