"""A block is message passing on a complete graph, so a tower commutes with permutations; what dropping and packing rest on.

All in fp64: a property holds to 1e-12, and the mistake beside it is off by far more. Asserted on patch tokens, where it shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.models.settings import ModelSettings
from pipeline.models.vision import VisionTower, build_tower, embed

SIDE, PATCHES, KEPT = 5, 25, 9
KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "registers": {"registers": 2},
    "rope": {"pos_embed": "rope", "registers": 2},
    "swiglu": {"ffn": "swiglu"},
}


@pytest.fixture(params=KINDS)
def tower(request: pytest.FixtureRequest) -> VisionTower:
    torch.manual_seed(0)
    model = ModelSettings(embed_dim=32, depth=4, num_heads=2, patch_size=4, layer_scale=None, **KINDS[request.param])
    built = build_tower(model, image_size=4 * SIDE).eval().double()
    with torch.no_grad():
        for p in built.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.2)
    return built.requires_grad_(False)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 4 * SIDE, 4 * SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def order() -> Tensor:
    return torch.randperm(PATCHES, generator=torch.Generator().manual_seed(2))


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def shuffled(images: Tensor, order: Tensor) -> Tensor:
    """The pictures with their patches in another order."""
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
    return patches.unflatten(2, (SIDE, SIDE)).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


def through(tower: VisionTower, x: Tensor, rope: dict[str, Any], attn_mask: Tensor | None = None) -> Tensor:
    """Tokens after the blocks, from what they are given."""
    for block in tower.vit.blocks:
        x = block(x, attn_mask=attn_mask, **rope)
    return tower.vit.norm(x)


def begun(tower: VisionTower, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
    return embed(tower.vit, images, None, keep, tower.mask_token, None, tower.resampling)


def test_without_positions_permuting_patches_permutes_outputs(tower: VisionTower, images: Tensor, order: Tensor) -> None:
    with_positions = error(tower(shuffled(images, order)).patches, tower(images).patches[:, order])
    assert with_positions > 1e-3
    if tower.vit.pos_embed is None:
        tower.vit.rope = None
    else:
        tower.vit.pos_embed.zero_()
    one, other = tower(images), tower(shuffled(images, order))
    assert error(other.patches, one.patches[:, order]) < 1e-12
    assert error(other.cls, one.cls) < 1e-12


def test_the_order_of_kept_patches_does_not_matter(tower: VisionTower, images: Tensor, order: Tensor) -> None:
    keep = torch.stack([order[:KEPT], order[-KEPT:]])
    one, other = tower(images, None, keep), tower(images, None, keep.flip(1))
    assert error(other.patches.flip(1), one.patches) < 1e-12 and error(other.cls, one.cls) < 1e-12
    assert one.kept is keep


def test_positions_added_after_dropping_would_be_wrong(tower: VisionTower, images: Tensor, order: Tensor) -> None:
    keep = order[:KEPT].expand(2, -1)
    right = tower(images, None, keep).patches
    x, rope = begun(tower, images)
    prefix = tower.vit.num_prefix_tokens
    if rope:
        late = torch.cat([x[:, :prefix], x[:, prefix:][:, order[:KEPT]]], dim=1)
        wrong = through(tower, late, {"rope": rope["rope"][:KEPT]})
    else:
        skip = 0 if tower.vit.no_embed_class else 1
        added = tower.vit.pos_embed[:, skip:]
        late = torch.cat([x[:, :prefix], (x[:, prefix:] - added)[:, order[:KEPT]] + added[:, :KEPT]], dim=1)
        wrong = through(tower, late, {})
    assert error(wrong[:, prefix:], right) > 1e-3


def test_dropping_is_the_same_as_hiding_the_dropped_keys(tower: VisionTower, images: Tensor, order: Tensor) -> None:
    prefix, kept = tower.vit.num_prefix_tokens, order[:KEPT].sort().values
    dropped = tower(images, None, kept.expand(2, -1))
    x, rope = begun(tower, images)
    visible = torch.zeros(x.shape[1], dtype=torch.bool)
    visible[:prefix] = True
    visible[prefix + kept] = True
    hidden = through(tower, x, rope, visible.expand(1, 1, x.shape[1], -1))
    assert error(hidden[:, prefix:][:, kept], dropped.patches) < 1e-12
    assert error(hidden[:, 0], dropped.cls) < 1e-12


def test_keeping_everything_is_no_dropping(tower: VisionTower, images: Tensor) -> None:
    everything = torch.arange(PATCHES).expand(2, -1)
    assert error(tower(images, None, everything).patches, tower(images).patches) < 1e-12


@pytest.mark.parametrize("kind", ["learned", "swiglu"])
def test_packing_needs_a_mask_that_follows_the_tokens(kind: str, images: Tensor, order: Tensor) -> None:
    torch.manual_seed(0)
    tower = build_tower(
        ModelSettings(embed_dim=32, depth=4, num_heads=2, patch_size=4, layer_scale=None, **KINDS[kind]), image_size=20
    )
    tower = tower.eval().double().requires_grad_(False)
    for p in tower.parameters():
        p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.2)
    keep = order[:KEPT].expand(1, -1)
    first, second = begun(tower, images[:1])[0], begun(tower, images[1:], keep)[0]
    apart = torch.cat([through(tower, first, {}), through(tower, second, {})], dim=1)
    pack = torch.cat([first, second], dim=1)
    owner = torch.cat([torch.zeros(first.shape[1]), torch.ones(second.shape[1])])
    mask = owner[:, None] == owner[None, :]

    assert error(through(tower, pack, {}, mask), apart) < 1e-12
    assert error(through(tower, pack, {}), apart) > 1e-3
    mixed = torch.randperm(len(owner), generator=torch.Generator().manual_seed(3))
    assert error(through(tower, pack[:, mixed], {}, mask[mixed][:, mixed]), apart[:, mixed]) < 1e-12
    assert error(through(tower, pack[:, mixed], {}, mask), apart[:, mixed]) > 1e-3


def test_two_hidden_patches_are_told_apart_by_their_positions(tower: VisionTower, images: Tensor) -> None:
    patches = tower(images, torch.ones(2, PATCHES, dtype=torch.bool)).patches
    assert error(patches[:, 0], patches[:, 1]) > 1e-6  # rotary positions alone say little where all is hidden
