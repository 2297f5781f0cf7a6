"""A large batch on few devices is the large batch: DINOv2 through the real engine, cut in many ways."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.augment.masks import block_masks, mask_counts
from pipeline.data.augment.settings import MultiCropSettings
from pipeline.data.augment.views import Batch, Masks
from pipeline.methods.base import Step
from pipeline.methods.dinov2.method import DINOv2, dinov2_views
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.rank_pool import pool

GLOBAL, LOCALS, K = 64, 2, 40
STEP = Step(momentum=0.9, teacher_temperature=0.05)
SETTINGS = Dinov2Settings(
    views=MultiCropSettings(global_size=16, local_size=8, local_count=LOCALS),
    prototypes=K,
    head_hidden=16,
    head_bottleneck=8,
    koleo_group_size=8,
    prototype_chunk_size=37,
)


def make_method(**changes: Any) -> DINOv2:
    """A student that is not its teacher, and centres that are not zero."""
    torch.manual_seed(0)
    model = ModelSettings(embed_dim=16, depth=2, num_heads=2, patch_size=4, layer_scale=None, registers=1)
    made = DINOv2(build_tower(model, image_size=16), SETTINGS.model_copy(update=changes))
    with torch.no_grad():
        for _, p in made.named_parameters():
            p.add_(0.05 * torch.randn_like(p))
        made.extra_state = {name: 0.1 * torch.randn_like(center) for name, center in made.extra_state.items()}
    return made


@cache
def _everything() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    spec = dinov2_views(SETTINGS, patch=4)[0].mask
    assert spec is not None
    grid = block_masks(mask_counts(2 * GLOBAL, 16, spec, 5), 4, 4, np.arange(2 * GLOBAL, dtype=np.uint64), 5, 1)
    large = torch.randn(2, GLOBAL, 3, 16, 16, generator=generator)
    small = torch.randn(LOCALS, GLOBAL, 3, 8, 8, generator=generator)
    return large, small, torch.from_numpy(grid).unflatten(0, (2, GLOBAL))


def part(rows: slice) -> Batch:
    """Some samples of the global batch."""
    large, small, hidden = _everything()
    grid = hidden[:, rows].flatten(0, 1)
    weight = (1.0 / grid.sum(1, keepdim=True).clamp(min=1)).expand(grid.shape)[grid]
    count = large[:, rows].shape[1]
    return Batch(
        views={"global": list(large[:, rows]), "local": list(small[:, rows])},
        masks={"global": Masks(grid, grid.flatten().nonzero().flatten(), weight)},
        labels=torch.full((count,), -1),
        keys=[str(i) for i in range(count)],
        ids=list(range(count)),
        position=0,
    )


def step_of(zero: int, accumulation: int, unprepared: bool = False, **changes: Any) -> dict[str, Any]:
    """On a rank: terms, gradients and centres of one step over its share of the global batch."""
    from pipeline.training.engine import Engine, EngineOptions

    made = make_method(**changes)
    micro = GLOBAL // dist.get_world_size() // accumulation
    options = EngineOptions(zero, "fp32", micro, accumulation, (0.9, 0.95), 1e-8, None, "network")  # type: ignore[arg-type]
    engine = Engine(made, options, torch.device("cpu"))
    first = dist.get_rank() * micro * accumulation
    parts = [part(slice(first + i * micro, first + (i + 1) * micro)) for i in range(accumulation)]
    if not unprepared:
        engine.before_accumulation(parts, STEP)
    each = [engine.forward_backward(batch, STEP) for batch in parts]
    terms = {name: torch.stack([one[name] for one in each]).mean() for name in each[0]}
    pieces = [(f.name, f.start, f.shape, f.gradient.flatten().clone()) for _, f in engine.layout.owned(gradients=True)]
    metrics = {name: float(value) for name, value in made.metrics.items()}
    engine.step(STEP, torch.tensor(True))
    made.after_step(STEP)
    centers = {name: center.clone() for name, center in made.extra_state.items()}
    engine.close()
    return {"terms": terms, "pieces": pieces, "metrics": metrics, "centers": centers}


def result(world: int, zero: int, accumulation: int, **changes: Any) -> dict[str, dict[str, Tensor]]:
    """What all ranks together found: mean terms, whole gradients, centres."""
    ranks = pool(world).run(step_of, zero=zero, accumulation=accumulation, **changes)
    gradients: dict[str, Tensor] = {}
    for rank in ranks:
        for name, start, shape, piece in rank["pieces"]:
            flat = gradients.setdefault(name, torch.full((torch.Size(shape).numel(),), torch.nan))
            flat[start : start + len(piece)] = piece
    terms = {name: torch.stack([rank["terms"][name] for rank in ranks]).mean() for name in ranks[0]["terms"]}
    return {"terms": terms, "gradients": gradients, "centers": ranks[-1]["centers"]}


@cache
def whole(targets: str) -> dict[str, dict[str, Tensor]]:
    """One rank, one batch."""
    return result(1, 0, 1, centering=targets)


def difference(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]], kind: str) -> float:
    """The largest of all tensors of a kind, each relative to the largest number of its own tensor."""
    assert found[kind].keys() == expected[kind].keys()
    return max(
        (float((found[kind][n] - e).abs().max() / e.abs().max()) for n, e in expected[kind].items() if e.abs().max() > 1e-9),
        default=0.0,
    )


@pytest.mark.parametrize("targets", ["sinkhorn_knopp", "softmax_center"])
@pytest.mark.parametrize(
    ("world", "zero", "accumulation"),
    [
        (1, 0, 4),
        (2, 1, 1),
        (2, 1, 2),
        (2, 3, 2),
        *(pytest.param(*cut, marks=pytest.mark.slow) for cut in [(1, 1, 4), (2, 0, 1), (2, 0, 2), (2, 2, 2)]),
    ],
)
def test_micro_batches_and_ranks_are_one_large_batch(world: int, zero: int, accumulation: int, targets: str) -> None:
    expected, found = whole(targets), result(world, zero, accumulation, centering=targets)
    assert difference(found, expected, "terms") < 1e-6
    assert difference(found, expected, "gradients") < 1e-5
    assert difference(found, expected, "centers") < 1e-6
    assert not any(gradient.isnan().any() for gradient in found["gradients"].values())


def test_micro_batches_that_do_not_know_of_each_other_are_another_thing() -> None:
    found = result(1, 0, 4, unprepared=True, centering="sinkhorn_knopp")
    assert difference(found, whole("sinkhorn_knopp"), "terms") > 1e-4
    assert difference(found, whole("sinkhorn_knopp"), "gradients") > 1e-2


@pytest.mark.parametrize(("world", "zero"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_targets_of_each_micro_batch_alone_are_those_of_batches_that_do_not_know_of_each_other(world: int, zero: int) -> None:
    found = result(world, zero, 4 // world, target_batch="micro")
    if world == 1:
        expected = result(1, 0, 4, unprepared=True, centering="sinkhorn_knopp")
        assert difference(found, expected, "terms") == difference(found, expected, "gradients") == 0
    assert difference(found, whole("sinkhorn_knopp"), "gradients") > 1e-2
    assert make_method(target_batch="micro").couples_batch and not make_method().couples_batch
    one = result(1, 0, 1, target_batch="micro")
    assert difference(one, whole("sinkhorn_knopp"), "gradients") == 0


def test_a_running_centre_has_no_targets_of_a_micro_batch() -> None:
    with pytest.raises(ValueError, match="target_batch: micro needs centering"):
        Dinov2Settings(target_batch="micro", centering="softmax_center")


def test_neighbours_within_a_micro_batch_depend_on_its_size() -> None:
    found, expected = (result(1, 0, cut, koleo_group_size=None) for cut in (4, 1))
    assert difference(found, expected, "terms") > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_neighbours_across_ranks_are_those_of_one_rank(zero: int) -> None:
    expected = result(1, 0, 1, koleo_group_size=None)
    found = result(2, zero, 1, koleo_group_size=None, koleo_across_ranks=True)
    assert difference(found, expected, "terms") < 1e-6
    assert difference(found, expected, "gradients") < 1e-5


def test_a_shared_plain_head_is_cut_as_well() -> None:
    changes = {"shared_heads": True, "head_norm": "plain", "koleo_topk": 2}
    expected, found = result(1, 0, 1, **changes), result(2, 3, 2, **changes)
    assert difference(found, expected, "terms") < 1e-6
    assert difference(found, expected, "gradients") < 1e-5
