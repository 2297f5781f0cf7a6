"""Pictures and captions small enough for tests, and what ranks do with CLIP: for the tests and for the ranks themselves."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.augment.settings import ViewSettings
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Method, Step
from pipeline.methods.clip.method import CLIP
from pipeline.methods.clip.settings import ClipSettings, TextSettings
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower

SAMPLES, CONTEXT, SIDE = 8, 6, 8
TEXT = TextSettings(architecture=None, width=16, depth=2, num_heads=2, context_length=CONTEXT)
MODEL = ModelSettings(embed_dim=16, depth=2, num_heads=2, patch_size=4, layer_scale=None)


def clip(model: ModelSettings = MODEL, **changes: Any) -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        build_tower(model, image_size=SIDE),
        ClipSettings(views=ViewSettings(global_size=SIDE), text=TEXT, embed_dim=12, **changes),
    )


def captions(n: int, seed: int = 0) -> Tensor:
    """Rows of start, some words, end, padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(300, 320, (n, CONTEXT), generator=generator)
    tokens[:, 0], tokens[:, 4], tokens[:, 5] = 49406, 49407, 0
    return tokens


def pairs_at(index: int, rows: slice = slice(None), views: tuple[str, ...] = ("image",)) -> Batch:
    """The global batch of a step, or some of its rows."""
    images = torch.randn(len(views), SAMPLES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(100 + index))
    numbers = list(range(SAMPLES))[rows]
    return Batch(
        views={name: [images[i][rows]] for i, name in enumerate(views)},
        labels=torch.full((len(numbers),), -1),
        keys=[str(n) for n in numbers],
        ids=numbers,
        position=index * SAMPLES,
        tokens=captions(SAMPLES, index)[rows],
        seed=1000 * index + numbers[0],
    )


def engine_of(
    method: Method, zero: Literal[0, 1, 2, 3], micro: int, accumulation: int, precision: Literal["fp32", "bf16"] = "fp32"
) -> Any:
    from pipeline.training.engine import Engine, EngineOptions

    options = EngineOptions(
        zero, precision, micro, accumulation, (0.9, 0.98), 1e-2, None, "global"
    )  # a large eps: no noise is blown up
    return Engine(method, options, torch.device("cpu"))


def trained(
    *,
    zero: Literal[0, 1, 2, 3],
    accumulation: int,
    steps: int = 2,
    precision: Literal["fp32", "bf16"] = "fp32",
    grad_cache: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Some steps on this rank's share; terms, gradient norms and all weights."""
    method = clip(grad_cache=grad_cache, **changes)
    share = SAMPLES // dist.get_world_size()
    micro, begin = share // accumulation, dist.get_rank() * share
    engine = engine_of(method, zero, micro, accumulation, precision)
    terms, norms = [], []
    for index in range(steps):
        step = Step(index=index, lr=1e-2, last_layer_lr=1e-2, weight_decay=0.1)
        parts = [pairs_at(index, slice(low, low + micro)) for low in range(begin, begin + share, micro)]
        engine.before_accumulation(parts, step)
        found = torch.stack([engine.forward_backward(part, step)["contrastive"] for part in parts]).mean()
        applied, norm = engine.step(step, found.isfinite())
        assert applied
        method.after_step(step)
        terms.append(float(found))
        norms.append({name: float(value) for name, value in norm.items()})
    with engine.gathered(teacher=True):
        weights = {name: p.detach().clone() for name, p in method.named_parameters()}
    engine.close()
    return {"terms": terms, "norms": norms, "weights": weights}
