"""DINOv2 small enough to be trained in seconds, healthy or made ill on purpose, and what the alarms say of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.augment.masks import block_masks, mask_counts
from pipeline.data.augment.settings import MultiCropSettings
from pipeline.data.augment.views import Batch, Masks
from pipeline.methods.base import Step
from pipeline.methods.dinov2.method import DINOv2
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from pipeline.training.alerts import Alert, Alerts

SAMPLES, LOCALS = 12, 1
SETTINGS = Dinov2Settings(
    views=MultiCropSettings(global_size=16, local_size=8, local_count=LOCALS),
    prototypes=64,
    head_hidden=32,
    head_bottleneck=16,
    head_layers=2,
)


def method(**changes: Any) -> DINOv2:
    torch.manual_seed(0)
    tower = build_tower(ModelSettings(embed_dim=24, depth=1, num_heads=2, patch_size=4, layer_scale=None), image_size=16)
    return DINOv2(tower, SETTINGS.model_copy(update=changes))


@cache
def pictures() -> Tensor:
    """Coloured blotches, few enough to be told apart soon."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(48, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, size=28, mode="bicubic") + 0.1 * torch.randn(48, 3, 28, 28, generator=generator)


def batch(number: int, made: DINOv2) -> Batch:
    """Crops of random pictures with random light, and masks."""
    generator = torch.Generator().manual_seed(1000 + number)
    chosen = pictures()[torch.randint(0, 48, (SAMPLES,), generator=generator)]

    def crop(size: int, out: int) -> Tensor:
        top, left = torch.randint(0, 28 - size + 1, (2,), generator=generator).tolist()
        cut = F.interpolate(chosen[:, :, top : top + size, left : left + size], size=out, mode="bilinear")
        light = torch.randn(SAMPLES, 4, 1, 1, generator=generator)
        return cut * (1 + 0.2 * light[:, :1]) + 0.1 * light[:, 1:]

    spec = made.views[0].mask
    assert spec is not None
    ids = np.arange(2 * SAMPLES, dtype=np.uint64)
    grid = torch.from_numpy(block_masks(mask_counts(2 * SAMPLES, 16, spec, number), 4, 4, ids, number, 1))
    weight = (1.0 / grid.sum(1, keepdim=True).clamp(min=1)).expand(grid.shape)[grid]
    return Batch(
        views={"global": [crop(22, 16) for _ in range(2)], "local": [crop(12, 8) for _ in range(LOCALS)]},
        masks={"global": Masks(grid, grid.flatten().nonzero().flatten(), weight)},
        labels=torch.full((SAMPLES,), -1),
        keys=[],
        ids=[],
        position=number * SAMPLES,
    )


def train(
    steps: int = 200,
    *,
    lr: float = 2e-3,
    momentum: float = 0.95,
    temperature: float = 0.05,
    frozen: bool = True,
    every: int = 5,
    **changes: Any,
) -> tuple[list[tuple[int, Alert]], list[dict[str, float]]]:
    """Train as the trainer does, in one process.

    Returns:
        Each alarm with the step at which it was raised, and the logged numbers.
    """
    made = method(**changes)
    groups = made.parameter_groups()
    optimizer = torch.optim.AdamW([{"params": list(g.params)} for g in groups], lr=0.0)
    alarms, raised, logged = Alerts(made.health_metrics), [], []
    since: list[dict[str, Tensor]] = []
    for index in range(steps):
        rate = lr * min(1.0, (index + 1) / 40)
        step = Step(index=index, momentum=momentum, teacher_temperature=temperature, lr=rate)
        for group, ours in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = 0.0 if frozen and ours.last_layer else rate * ours.lr_scale
        terms = made(batch(index, made), step)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 3.0)
        optimizer.step()
        made.after_step(step)
        since.append({"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}, **made.metrics})
        if len(since) == every:
            values = {name: float(torch.stack([one[name] for one in since]).mean()) for name in since[0]}
            since = []
            logged.append(values)
            raised += [(index + 1, alarm) for alarm in alarms.look(step, index + 1, values)]
    return raised, logged
