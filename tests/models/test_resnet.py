"""A ResNet as a tower, and towers with parts that stand still."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.eval_model import EvalModel
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


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "resnet18d"])
@pytest.mark.parametrize(("stem", "patch"), [("small", 8), ("small_pooled", 16), ("patch", 32)])
def test_a_small_stem_keeps_small_images_large(name: str, stem: str, patch: int) -> None:
    tower = build_trunk(ModelSettings.model_validate({"timm_name": name, "stem": stem}), image_size=32).eval()
    assert isinstance(tower, ResNetTower) and tower.patch == patch
    with torch.no_grad():
        assert tower(torch.randn(1, 3, 32, 32)).patches.shape == (1, (32 // patch) ** 2, 512)
    if stem != "patch":
        assert isinstance(tower.net.conv1, nn.Conv2d) and tower.net.conv1.stride == (1, 1)


def test_width_and_blocks_make_a_network_of_a_million_parameters() -> None:
    small = {"timm_name": "resnet18", "stem": "small", "resnet_width": 32, "resnet_blocks": [1, 1, 1, 1]}
    tower = build_trunk(ModelSettings.model_validate(small), image_size=32)
    assert isinstance(tower, ResNetTower) and tower.width == 256
    stem = 3 * 9 * 32 + 2 * 32
    stages = sum(9 * w * (w // 2 + w) + 4 * w + w * (w // 2) + 2 * w for w in (64, 128, 256)) + 2 * 9 * 32 * 32 + 4 * 32
    assert sum(p.numel() for p in tower.parameters()) == stem + stages
    assert tower.net.conv1.weight.shape == (32, 3, 3, 3)


def test_a_narrow_network_with_its_own_stem_is_timms() -> None:
    settings = ModelSettings(timm_name="resnet10t", resnet_width=32, resnet_blocks=(2, 1, 1, 1))
    tower = build_trunk(settings, image_size=64)
    assert isinstance(tower, ResNetTower)
    theirs = timm.create_model(tower.timm_name, **tower.timm_args)
    theirs.load_state_dict(tower.net.state_dict())
    assert theirs.bn1.num_features == 32 and len(theirs.layer1) == 2


def _plain_resnets() -> list[str]:
    names = [
        name for name in timm.list_models("*resnet*") if timm.models.model_entrypoint(name).__module__ == "timm.models.resnet"
    ]
    return [name for name in names if not name.endswith(("_pruned", "_gn"))]


@pytest.mark.slow
def test_every_resnet_of_timm_works_with_every_stem() -> None:
    assert len(_plain_resnets()) > 50
    for name, stem in itertools.product(_plain_resnets(), ("patch", "small", "small_pooled")):
        sizes = {"resnet_width": 8, "resnet_blocks": [1, 1, 1, 1]}
        settings = ModelSettings.model_validate({"timm_name": name, "stem": stem, **sizes})
        with torch.device("meta"):
            tower = build_trunk(settings, image_size=64).eval()
            assert tower(torch.randn(2, 3, 64, 64)).patches.shape == (2, (64 // tower.patch) ** 2, tower.width), (name, stem)


@pytest.mark.parametrize("name", ["resnet18", "resnet10t"])
def test_channels_last_computes_the_same_and_keeps_the_weights(name: str) -> None:
    settings = {"timm_name": name, "stem": "small_pooled", "resnet_width": 16, "resnet_blocks": [1, 1, 1, 1]}
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    outputs, layouts = [], []
    for last in (False, True):
        torch.manual_seed(1)
        tower = build_trunk(ModelSettings.model_validate({**settings, "channels_last": last}), image_size=32)
        assert isinstance(tower, ResNetTower)
        tower.net.layer2.register_forward_hook(
            lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
        outputs.append(tower(images).cls)
        outputs[-1].square().sum().backward()
        assert all(p.is_contiguous() for p in tower.parameters())
    assert layouts == [False, True]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnetv2_50", "resnet50_gn", "ecaresnet50d_pruned"])
def test_other_networks_are_refused(name: str) -> None:
    assert isinstance(build_trunk(VIT, image_size=16), VisionTower)
    with pytest.raises(ConfigError, match="no plain ResNet"):
        build_trunk(ModelSettings(timm_name=name), image_size=64)


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


def test_the_linear_probe_reads_the_last_map() -> None:
    tower = build_trunk(ModelSettings(timm_name="resnet18", resnet_width=8), image_size=32).eval()
    model = EvalModel(tower, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # type: ignore[arg-type]
    with torch.no_grad():
        layers, cls = model.layers(torch.randn(3, 3, 64, 64), 4), model.cls(torch.randn(3, 3, 64, 64))
    assert model.depth == 1 and layers.shape == (3, 1, 2, 64) and cls.shape == (3, 64)
    torch.testing.assert_close(layers.mean(-1), torch.zeros(3, 1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(layers[:, :, 0], layers[:, :, 1])
