"""Builds our and the official DINOv2 training step with the same weights and the same batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pipeline.bench.official import Official, missing
from pipeline.bench.pairs import Contest
from pipeline.config.sizes import Size, grid_of, height_width
from pipeline.data.augment.masks import block_masks, mask_counts
from pipeline.data.augment.settings import MultiCropSettings
from pipeline.data.augment.views import Batch, Masks
from pipeline.methods.base import Step
from pipeline.methods.dinov2.method import DINOv2, dinov2_views
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from pipeline.training.engine import Engine, EngineOptions

SIZES = {"tiny": (64, 2, 2), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, depth, heads
MODELS = [f"{size}-{patch}" for size in SIZES for patch in (14, 16)]
_LAYER_SCALE = 1.0  # with 1e-5 as at initialization all class tokens are nearly equal, and KoLeo's value would be rounding error
_STILL = Step(teacher_temperature=0.07, momentum=1.0)  # learning rate 0: every round is the same step


def contest(model: str, samples: int, prototypes: int, drop: float, *, bf16: bool, device: torch.device) -> Contest:
    """Both steps (ours only if the official code is not installed), with ten crops per sample as published: two of 224 and eight
    of 98 or 96 pixels.

    Args:
        model: one of :data:`MODELS`.
        samples: samples per step.
        prototypes: of the head that class and patch tokens share.
        drop: rate of stochastic depth.
        bf16: compute under autocast.
        device: device of the weights and the batch.
    """
    name, patch = model.split("-")[0], int(model.split("-")[1])
    sides = (4 * patch, 2 * patch) if name == "tiny" else (224, 98 if patch == 14 else 96)
    torch.manual_seed(0)
    width, depth, heads = SIZES[name]
    settings = Dinov2Settings(
        views=MultiCropSettings(global_size=sides[0], local_size=sides[1], local_count=8),
        prototypes=prototypes,
        shared_heads=True,
    )
    sizes = ModelSettings(
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        patch_size=patch,
        layer_scale=_LAYER_SCALE,
        drop_path=drop,
        batched_drop_path=True,
        pos_embed_interpolation="offset",
    )
    method = DINOv2(build_tower(sizes, image_size=sides[0]), settings).to(device).move_state(device).train()
    batch = _batch(settings, patch, samples, device)
    theirs = None if missing() else Official(method, SIZES[name], drop, _LAYER_SCALE, batch, bf16)
    options = EngineOptions(
        1, "bf16" if bf16 else "fp32", samples, 1, (0.9, 0.999), 1e-8, settings.clip_norm, settings.clip_scope
    )
    engine = Engine(method, options, device)

    def ours() -> float:
        terms = torch.stack(list(engine.forward_backward(batch, _STILL).values()))
        engine.step(_STILL, terms.isfinite().all())
        method.after_step(_STILL)
        return float(terms.detach().sum())  # read once here; our loop reads it after a later step has begun

    def losses() -> tuple[float, float]:
        assert theirs is not None
        _set_drop(method, 0.0)
        theirs.set_drop(0.0)
        losses = ours(), theirs.step()
        _set_drop(method, drop)
        theirs.set_drop(drop)
        return losses

    about = f"ViT-{model}, {samples} samples of 2 crops of {sides[0]} and 8 of {sides[1]} pixels, {prototypes} prototypes in a "
    about += f"shared head, stochastic depth {drop:g}; forward, backward, clipping, AdamW, teacher"
    towers: list[Any] = [method.backbone, method.teacher.modules["backbone"]]
    blocks = [block for tower in towers for block in tower.vit.blocks]
    if theirs is None:
        return Contest(ours, None, blocks, None, about)
    return Contest(ours, ("official", theirs.step), blocks, losses, about)


def _set_drop(method: DINOv2, rate: float) -> None:
    block: Any
    for block in method.backbone.vit.blocks:
        block.dropped = rate


def _batch(settings: Dinov2Settings, patch: int, samples: int, device: torch.device) -> Batch:
    """Random pixels, and masks as configured."""
    spec = dinov2_views(settings, patch=patch)[0].mask
    assert spec is not None
    v, rows = settings.views, 2 * samples
    grid = grid_of(v.global_size, patch)
    ids = np.arange(rows, dtype=np.uint64)
    hidden = torch.from_numpy(block_masks(mask_counts(rows, math.prod(grid), spec, 0), *grid, ids, 0, 1))
    weight = (1.0 / hidden.sum(1, keepdim=True).clamp(min=1)).expand(hidden.shape)[hidden]
    masks = Masks(hidden.to(device), hidden.flatten().nonzero().flatten().to(device), weight.to(device))

    def images(count: int, size: Size) -> list[torch.Tensor]:
        return [torch.randn(samples, 3, *height_width(size), device=device) for _ in range(count)]

    return Batch(
        views={"global": images(2, v.global_size), "local": images(v.local_count, v.local_size)},
        masks={"global": masks},
        labels=torch.full((samples,), -1),
        keys=[str(n) for n in range(samples)],
        ids=list(range(samples)),
        position=0,
    )
