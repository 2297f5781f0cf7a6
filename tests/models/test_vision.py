"""Towers: parity with timm, mask token, sizes, export."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.vision import VisionTower, build_tower
from pipeline.settings import ModelSettings

TINY: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "patch": 4}


def tiny(**changes: Any) -> VisionTower:
    torch.manual_seed(0)
    return build_tower(ModelSettings(**(TINY | changes)), image_size=16).eval()


def spread(module: nn.Module) -> None:
    """Weights large enough that every path matters (layer scales and tokens start near zero)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 3},
        {"stem": "conv"},
        {"ffn": "swiglu"},
        {"layer_scale": None},
        {"patch": 8, "stem": "conv", "registers": 1},
    ],
    ids=["plain", "registers", "conv", "swiglu", "no_scale", "conv_registers"],
)
def test_tokens_are_exactly_what_the_same_timm_model_gives(changes: dict[str, Any]) -> None:
    tower = tiny(**changes)
    spread(tower)
    other = timm.create_model(tower.timm_name, **tower.timm_args).eval()
    other.load_state_dict(tower.vit.state_dict(), strict=True)
    for size in ((16, 16), (24, 8)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            tokens, expected = tower(images), other.forward_features(images)
        got = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("name", "registers"), [("vit_small_patch14_dinov2", 0), ("vit_small_patch14_reg4_dinov2", 4)])
def test_released_architectures_are_held_unchanged(name: str, registers: int) -> None:
    tower = build_tower(ModelSettings(timm=name, layer_scale=1e-5), image_size=28).eval()
    spread(tower.vit.blocks[0])
    other = timm.create_model(name, img_size=28, num_classes=0).eval()
    other.load_state_dict(tower.vit.state_dict(), strict=True)
    images = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        tokens, expected = tower(images), other.forward_features(images)
    assert (tower.width, tower.patch, tokens.registers.shape[1], tokens.patches.shape[1]) == (384, 14, registers, 4)
    assert torch.equal(torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1), expected)


def test_a_tower_given_by_sizes_has_the_size_of_the_paper() -> None:
    sizes = ModelSettings(width=384, depth=12, heads=6, patch=14)
    with torch.device("meta"):
        tower = build_tower(sizes, image_size=518)
    assert sum(p.numel() for p in tower.parameters()) == 22_056_576
    with torch.device("meta"):
        swiglu = build_tower(ModelSettings(width=1024, depth=24, heads=16, patch=14, ffn="swiglu"), image_size=224)
    assert sum(p.numel() for p in swiglu.parameters()) == 303_655_168


def test_hidden_patches_cannot_be_seen() -> None:
    tower = tiny()
    spread(tower)
    images = torch.randn(1, 3, 16, 16)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    changed = images.clone()
    changed[..., 4:8, 4:8] += 10.0
    with torch.no_grad():
        assert torch.equal(tower(images, mask).patches, tower(changed, mask).patches)
        assert not torch.equal(tower(images).cls, tower(changed).cls)
        assert torch.equal(tower(images, torch.zeros_like(mask)).cls, tower(images).cls)


def test_the_mask_token_is_put_in_before_the_position_is_added() -> None:
    tower = tiny()
    spread(tower)
    mask = torch.ones(1, 16, dtype=torch.bool)
    with torch.no_grad():
        patches = tower(torch.randn(1, 3, 16, 16), mask).patches[0]
    assert not torch.allclose(patches[0], patches[1])


def test_checkpointing_changes_memory_only() -> None:
    images = torch.randn(2, 3, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        tower = tiny(layer_scale=None)
        tower.checkpointing = checkpointing
        tower(images).cls.sum().backward()
        gradients.append([p.grad for p in tower.vit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_stochastic_depth_has_one_rate_in_all_blocks() -> None:
    tower = tiny(drop_path=0.25)
    assert [block.drop_path1.drop_prob for block in tower.vit.blocks] == [0.25, 0.25]
    assert tower.vit.state_dict().keys() == tiny().vit.state_dict().keys()


def test_no_parameter_is_a_bare_number_or_strided() -> None:
    assert all(p.ndim > 0 and p.is_contiguous() for p in tiny(stem="conv", registers=2).parameters())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (ModelSettings(), "architecture"),
        (ModelSettings(**(TINY | {"width": 33})), "divide"),
        (ModelSettings(**(TINY | {"patch": 5})), "divide"),
        (ModelSettings(timm="vit_smal_patch16_224"), "no model"),
        (ModelSettings(timm="resnet18"), "vit"),
        (ModelSettings(timm="vit_wee_patch16_reg1_gap_256"), "class token"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(settings: ModelSettings, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_tower(settings, image_size=16)


def test_compiled_blocks_compute_what_the_blocks_compute() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        tower = tiny(depth=1)
        spread(tower)
        if compiled:
            for block in tower.vit.blocks:
                block.compile(backend="aot_eager")  # traced as ever; only the last stage would need a C++ compiler
        cls = tower(images).cls
        cls.square().mean().backward()
        results.append((cls.detach(), [p.grad for p in tower.parameters() if p.grad is not None]))
    (plain, gradients), (fast, others) = results
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    assert len(gradients) == len(others)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, atol=1e-5, rtol=1e-3)
