"""A ResNet as a tower, and towers with parts that stand still."""

from __future__ import annotations

import pytest
import timm
import torch

from pipeline.errors import ConfigError
from pipeline.models.resnet import ResNetTower, build_trunk, fix_positions, freeze_patches
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import VisionTower

VIT = ModelSettings(embed_dim=16, depth=1, num_heads=2, patch_size=4, layer_scale=None)


def test_tokens_are_the_last_map_and_its_mean_and_weights_are_timms() -> None:
    torch.manual_seed(0)
    tower = build_trunk(ModelSettings(timm_name="resnet18"), image_size=64).eval()
    assert isinstance(tower, ResNetTower)
    images = torch.randn(2, 3, 64, 64)
    theirs = timm.create_model("resnet18", num_classes=0).eval()
    theirs.load_state_dict(tower.net.state_dict())
    with torch.no_grad():
        tokens, expected = tower(images), theirs.forward_features(images)
    torch.testing.assert_close(tokens.patches, expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens.cls, theirs(images))
    assert tokens.registers.shape == (2, 0, tower.width) and tokens.patches.shape == (2, (64 // tower.patch) ** 2, 512)


def test_a_small_stem_keeps_small_pictures_large() -> None:
    tower = build_trunk(ModelSettings(timm_name="resnet18", stem="small"), image_size=32).eval()
    with torch.no_grad():
        assert tower(torch.randn(1, 3, 32, 32)).patches.shape == (1, (32 // tower.patch) ** 2, 512)
    assert tower.patch == 8


def test_other_names_are_other_things() -> None:
    assert isinstance(build_trunk(VIT, image_size=16), VisionTower)
    with pytest.raises(ConfigError, match="no plain ResNet"):
        build_trunk(ModelSettings(timm_name="resnetv2_50"), image_size=64)


def test_positions_of_sines_tell_row_from_column_and_stand_still() -> None:
    tower = build_trunk(VIT, image_size=16)
    assert isinstance(tower, VisionTower)
    fix_positions(tower)
    freeze_patches(tower)
    position = tower.vit.pos_embed
    assert not position.requires_grad and not any(p.requires_grad for p in tower.vit.patch_embed.parameters())
    assert bool((position[0, 0] == 0).all()) and len(torch.unique(position[0], dim=0)) == 17
    grid = position[0, 1:].unflatten(0, (4, 4))
    assert torch.equal(grid[0, :, :8], grid[3, :, :8]) and torch.equal(grid[:, 0, 8:], grid[:, 3, 8:])
    torch.testing.assert_close(grid[2, 3, :4], torch.sin(3 * 10000.0 ** -(torch.arange(4) / 4)), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError):
        freeze_patches(build_trunk(ModelSettings(timm_name="resnet18"), image_size=32))
