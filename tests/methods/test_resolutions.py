"""DINOv2 with crops of several sizes, and a Gram anchor that sees larger ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.cli.estimate import measure
from pipeline.bench.flops import cost
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.errors import ConfigError
from pipeline.losses import gram, resampled_patches
from pipeline.methods.dinov2.method import DINOv2
from pipeline.methods.dinov2.settings import Dinov2Settings, Resolution
from tests.methods.test_distill import SIZES, STEP, batch, tower

TEXT = """
method:
  name: dinov2
  views: {global_size: 64, local_size: 32}
  prototypes: 4096
  head_hidden: 256
  head_bottleneck: 64
  gram_weight: 1.0
  resolutions:
    - {weight: 1, gram_size: 128}
    - {weight: 3, global_size: 96, local_size: 48, gram_size: 160}
model: {embed_dim: 192, depth: 2, num_heads: 3, patch_size: 16}
data: {shards: x.tar}
"""


def settings(**changes: Any) -> Dinov2Settings:
    return Dinov2Settings(**(SIZES | changes))


def loaded(folder: Path, text: str = TEXT, *overrides: str) -> Config:
    (folder / "c.yaml").write_text(text)
    return load(folder / "c.yaml", overrides).config


def sides(specs: Any) -> dict[str, int]:
    return {spec.name: spec.size for spec in specs}


def test_each_resolution_is_a_set_of_views_and_what_it_leaves_open_is_the_views_own() -> None:
    resolutions = (Resolution(weight=0.5), Resolution(global_size=24, gram_size=48), Resolution(local_size=12))
    method = DINOv2(tower(16), settings(resolutions=resolutions, gram_weight=1.0, gram_size=32))
    assert sides(method.views) == {"global": 16, "local": 8, "gram": 32}
    assert [one.weight for one in method.view_sets] == [0.5, 1.0, 1.0]
    assert [sides(one.views) for one in method.view_sets] == [
        {"global": 16, "local": 8, "gram": 32},
        {"global": 24, "local": 8, "gram": 48},
        {"global": 16, "local": 12, "gram": 32},
    ]
    (again,) = (spec for spec in method.views if spec.name == "gram")
    assert again.same_as == "global" and again.mask is None
    assert (again.crop_scale, again.count) == (method.views[0].crop_scale, method.views[0].count)
    (colours,) = again.augment
    assert colours.flip_probability == method.views[0].augment[0].flip_probability
    assert colours.jitter_probability == colours.gray_probability == colours.blur_probability == colours.solarize_probability == 0
    plain = DINOv2(tower(16), settings())
    assert [one.views for one in plain.view_sets] == [plain.views] and set(sides(plain.views)) == {"global", "local"}


def test_the_anchor_sees_its_own_crops_and_is_brought_onto_the_students_grid() -> None:
    method = DINOv2(tower(16), settings(gram_weight=2.0, gram_size=32)).eval()
    assert method.gram is not None
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    data = batch(hidden=0.3)
    large = [torch.randn(len(data.ids), 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    data = replace(data, views=data.views | {"gram": large})
    seen: list[tuple[int, ...]] = []
    method.gram["backbone"].register_forward_hook(lambda _, given, __: seen.append(tuple(given[0].shape)))
    terms = method(data, STEP)
    assert seen == [(2 * len(data.ids), 3, 32, 32)]
    ours = method.backbone(torch.cat(data.views["global"]), data.masks["global"].grid).patches
    theirs = method.gram["backbone"](torch.cat(large)).patches
    assert theirs.shape[1] == 4 * ours.shape[1]
    assert float(terms["gram"].detach()) == pytest.approx(
        float(2.0 * gram(ours, resampled_patches(theirs, 4)).detach()), rel=1e-5
    )


def test_one_method_takes_steps_of_any_size() -> None:
    method = DINOv2(tower(16), settings(resolutions=(Resolution(), Resolution(global_size=24))))

    def larger(data: Batch) -> Batch:
        grid = torch.zeros(2 * len(data.ids), 36, dtype=torch.bool)
        grid[:, :9] = True
        masks = replace(
            data.masks["global"], grid=grid, index=grid.flatten().nonzero()[:, 0], weight=torch.ones(9 * len(grid)) / 9
        )
        views = {"global": [torch.randn(len(data.ids), 3, 24, 24) for _ in range(2)], "local": data.views["local"]}
        return replace(data, views=views, masks={"global": masks})

    for data in (batch(0.3), larger(batch())):
        terms = method(data, STEP)
        total: Tensor = torch.stack(list(terms.values())).sum()
        total.backward()
        assert bool(total.isfinite()) and all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)


def test_the_local_crops_part_can_weigh_less() -> None:
    whole, half = (DINOv2(tower(16), settings(local_weight=weight)).eval() for weight in (1.0, 0.5))
    half.load_state_dict(whole.state_dict())
    assert half.teacher is not None and whole.teacher is not None
    half.teacher.load_state_dict(whole.teacher.state_dict())
    ours, theirs = half(batch(0.3), STEP), whole(batch(0.3), STEP)
    assert float(ours["dino_local"].detach()) == pytest.approx(0.5 * float(theirs["dino_local"].detach()), rel=1e-6)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "dino_local")
    assert all(torch.equal(ours_, theirs_) for ours_, theirs_ in zip(half.metrics.values(), whole.metrics.values(), strict=True))


@pytest.mark.slow
def test_plan_makes_room_for_the_largest_and_operations_are_the_mean(tmp_path: Path) -> None:
    mixed = loaded(tmp_path)
    small = loaded(tmp_path, TEXT, "method.resolutions=[]", "method.gram_size=128")
    sized = ["method.resolutions=[]", "method.views={global_size: 96, local_size: 48}", "method.gram_size=160"]
    large = loaded(tmp_path, TEXT, *sized)
    assert measure(mixed).live.each == pytest.approx(measure(large).live.each)
    assert measure(large).live.each > 1.5 * measure(small).live.each
    both = [cost("x", config) for config in (small, large)]
    found = cost("x", mixed)
    assert found.counted == pytest.approx((both[0].counted + 3 * both[1].counted) / 4, rel=1e-6)
    assert all(one.apart is not None and abs(one.apart) < 0.03 for one in (*both, found)), (both, found)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "method.resolutions=[{global_size: 96}, {global_size: 100}]",
            "method.resolutions.1.global_size = 100: is not divisible",
        ),
        ("method.resolutions=[{local_size: 50}]", "48 or 64 would"),
        ("method.resolutions=[{gram_size: 130}]", "method.resolutions.0.gram_size = 130"),
        ("method.gram_size=100", "method.gram_size = 100: is not divisible"),
        ("method.resolutions=[{weight: 0}]", "greater than 0"),
        ("method.resolutions=[{size: 96}]", "allowed under method.resolutions: global_size, gram_size, local_size, weight"),
        ("method.resolutions=[{global_size: 16}]", "nothing to mask"),
        ("method.gram_weight=0", "has no effect while method.gram_weight = 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, TEXT, override)
    assert words in str(caught.value)
