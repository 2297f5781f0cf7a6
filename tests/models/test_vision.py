"""Towers: parity with timm, mask token, sizes, export."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import VisionTower, build_tower

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
PATCH = {
    "vit_small_patch14_dinov2": 14,
    "vit_small_patch14_reg4_dinov2": 14,
    "vit_small_patch16_dinov3": 16,
    "vit_small_plus_patch16_dinov3_qkvb": 16,
}


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
        {"patch_size": 8, "stem": "conv", "registers": 1},
        {"pos_embed": "rope"},
        {
            "pos_embed": "rope",
            "registers": 4,
            "ffn": "swiglu",
            "rope_base": 50.0,
            "rope_rescale_coords": 2.0,
            "layer_scale": None,
        },
        {"drop_path": 0.5, "untie_local_norm": True},
        {"drop_path": 0.5, "pos_embed": "rope"},
    ],
    ids=["plain", "registers", "conv", "swiglu", "no_scale", "conv_registers", "rope", "rope_all", "depth", "rope_depth"],
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


@pytest.mark.parametrize(
    ("name", "registers"),
    [
        ("vit_small_patch14_dinov2", 0),
        ("vit_small_patch14_reg4_dinov2", 4),
        ("vit_small_patch16_dinov3", 4),
        ("vit_small_plus_patch16_dinov3_qkvb", 4),
    ],
)
def test_released_architectures_are_held_unchanged(name: str, registers: int) -> None:
    tower = build_tower(ModelSettings(timm_name=name, drop_path=0.1), image_size=2 * PATCH[name]).eval()
    spread(tower.vit.blocks[0])
    other = timm.create_model(name, img_size=2 * PATCH[name], num_classes=0, dynamic_img_size=True).eval()
    other.load_state_dict(tower.vit.state_dict(), strict=True)
    images = torch.randn(1, 3, 2 * tower.patch, 2 * tower.patch)
    with torch.no_grad():
        tokens, expected = tower(images), other.forward_features(images)
    assert (tower.width, tower.patch, tokens.registers.shape[1], tokens.patches.shape[1]) == (384, PATCH[name], registers, 4)
    assert torch.equal(torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1), expected)


def test_a_tower_given_by_sizes_has_the_size_of_the_paper() -> None:
    sizes = ModelSettings(embed_dim=384, depth=12, num_heads=6, patch_size=14)
    with torch.device("meta"):
        tower = build_tower(sizes, image_size=518)
    assert sum(p.numel() for p in tower.parameters()) == 22_056_576
    with torch.device("meta"):
        swiglu = build_tower(ModelSettings(embed_dim=1024, depth=24, num_heads=16, patch_size=14, ffn="swiglu"), image_size=224)
    assert sum(p.numel() for p in swiglu.parameters()) == 303_655_168


GIANT = ModelSettings(embed_dim=1536, depth=40, num_heads=24, patch_size=14, ffn="swiglu", registers=4)


@pytest.mark.parametrize(
    ("settings", "size", "parameters"),
    [
        (ModelSettings(embed_dim=384, depth=12, num_heads=6, patch_size=16), 224, 21_675_264),
        (ModelSettings(embed_dim=768, depth=12, num_heads=12, patch_size=14), 518, 86_580_480),
        (ModelSettings(embed_dim=768, depth=12, num_heads=12, patch_size=16), 224, 85_817_856),
        (ModelSettings(embed_dim=1024, depth=24, num_heads=16, patch_size=14), 518, 304_368_640),
        (ModelSettings(embed_dim=1024, depth=24, num_heads=16, patch_size=16), 224, 303_351_808),
        (GIANT.model_copy(update={"registers": 0}), 224, 1_134_771_200),
    ],
    ids=["S16", "B14", "B16", "L14", "L16", "g14"],
)
def test_towers_given_by_sizes_have_as_many_parameters_as_the_reference(
    settings: ModelSettings, size: int, parameters: int
) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build_tower(settings, image_size=size).parameters()) == parameters


def test_a_giant_with_registers_has_the_parameters_of_timm_and_of_the_reference_but_a_class_position() -> None:
    with torch.device("meta"):
        tower = build_tower(GIANT, image_size=518)
        other = timm.create_model("vit_giant_patch14_reg4_dinov2", img_size=518, num_classes=0)
    shapes = {name: tensor.shape for name, tensor in tower.vit.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in other.state_dict().items()}
    assert sum(p.numel() for p in tower.parameters()) == 1_136_486_912 - 1536


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


def test_local_crops_have_a_norm_of_their_own_if_asked_for() -> None:
    tower, images = tiny(untie_local_norm=True), torch.randn(2, 3, 8, 8)
    assert tower.local_norm is not None and torch.equal(tower(images, local=True).cls, tower(images).cls)
    with torch.no_grad():
        tower.local_norm.bias.add_(1.0)
    assert torch.allclose(tower(images, local=True).cls, tower(images).cls + 1.0)
    tower(images, local=True).cls.square().mean().backward()
    assert tower.vit.norm.weight.grad is None and tower.local_norm.weight.grad is not None
    assert not any("local" in name for name in tower.vit.state_dict())
    assert torch.equal(tiny()(images, local=True).cls, tiny()(images).cls)


def test_rotary_coordinates_move_in_training_only_and_with_the_seed() -> None:
    tower, images = (
        tiny(pos_embed="rope", rope_rescale_coords=2.0, rope_jitter_coords=1.5, rope_shift_coords=0.3),
        torch.randn(1, 3, 16, 16),
    )
    spread(tower)
    with torch.no_grad():
        still = tower(images).cls
        assert torch.equal(still, tower(images).cls)
        tower.train()
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(tower(images).cls)
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2]) and not torch.allclose(drawn[0], still)


def test_rotary_periods_are_those_of_dinov3() -> None:
    tower = tiny(pos_embed="rope", embed_dim=128, num_heads=2)
    periods = tower.vit.rope.periods
    assert periods[:4].tolist() == pytest.approx([1, 1.333521, 1.778279, 2.371374], abs=1e-5)
    assert float(periods[-1]) == pytest.approx(74.98942, abs=1e-4)
    angles = tower.vit.rope.eval().get_embed((2, 3))
    sine, cosine = angles.chunk(2, dim=-1)
    assert sine[0, [1, 16]].tolist() == pytest.approx([-0.707342, 0.866025], abs=1e-5)
    assert cosine[5, [0, 16]].tolist() == pytest.approx([-1.0, -0.5], abs=1e-5)


def test_a_rotary_tower_starts_with_matrices_of_one_size_at_every_depth() -> None:
    torch.manual_seed(0)
    blocks = tiny(pos_embed="rope", embed_dim=128, depth=4).vit.blocks
    deviations = [float(layer.weight.detach().std()) for block in blocks for layer in (block.attn.proj, block.mlp.fc2)]
    assert deviations == pytest.approx([0.02] * 8, rel=0.05)


def test_no_parameter_is_a_bare_number_or_strided() -> None:
    assert all(p.ndim > 0 and p.is_contiguous() for p in tiny(stem="conv", registers=2).parameters())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (ModelSettings(), "architecture"),
        (ModelSettings(**(TINY | {"embed_dim": 33})), "divide"),
        (ModelSettings(**(TINY | {"patch_size": 5})), "divide"),
        (ModelSettings(timm_name="vit_smal_patch16_224"), "no model"),
        (ModelSettings(timm_name="resnet18"), "vit"),
        (ModelSettings(timm_name="vit_wee_patch16_reg1_gap_256"), "class token"),
        (ModelSettings(**TINY, pos_embed="rope", stem="conv"), "no convolutional stem"),
        (ModelSettings(**(TINY | {"embed_dim": 36}), pos_embed="rope"), "multiple of 4"),
        (ModelSettings(**TINY, rope_rescale_coords=2.0), "apply to rotary positions only"),
        (ModelSettings(timm_name="vit_tiny_patch16_224", rope_shift_coords=0.1), "apply to rotary positions only"),
        (ModelSettings(timm_name="eva02_tiny_patch14_224", pos_embed_interpolation="offset"), "antialias"),
        (ModelSettings(timm_name="vit_small_patch16_rope_mixed_224"), "frequencies|class token"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(settings: ModelSettings, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_tower(settings, image_size=16)


@pytest.mark.slow
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
