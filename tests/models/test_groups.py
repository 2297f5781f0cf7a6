"""Parameter groups: multipliers of the reference, and that nothing is forgotten or counted twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.models.groups import ParameterGroup, parameter_groups
from pipeline.models.heads import PrototypeHead
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower


class Student(nn.Module):
    """A tower and a head under names that say nothing."""

    def __init__(self, settings: ModelSettings, image_size: int) -> None:
        super().__init__()
        self.alpha = build_tower(settings, image_size=image_size)
        self.beta = PrototypeHead(self.alpha.width, hidden=8, bottleneck=4, prototypes=6)


@pytest.fixture(scope="module")
def large() -> Student:
    with torch.device("meta"):
        return Student(ModelSettings(embed_dim=1024, depth=24, num_heads=16, patch_size=16), 224)


def where(groups: list[ParameterGroup], name: str) -> ParameterGroup:
    return next(group for group in groups if name in group.names)


@pytest.mark.parametrize(
    ("name", "lr_scale", "wd_scale"),
    [
        ("alpha.vit.cls_token", 0.07178979877, 1.0),
        ("alpha.vit.pos_embed", 0.07178979877, 1.0),
        ("alpha.mask_token", 0.07178979877, 1.0),
        ("alpha.vit.patch_embed.proj.weight", 0.01435795975, 1.0),
        ("alpha.vit.patch_embed.proj.bias", 0.01435795975, 0.0),
        ("alpha.vit.blocks.0.attn.qkv.weight", 0.07976644308, 1.0),
        ("alpha.vit.blocks.0.norm1.weight", 0.07976644308, 0.0),
        ("alpha.vit.blocks.11.mlp.fc1.weight", 0.2541865828, 1.0),
        ("alpha.vit.blocks.11.ls1.gamma", 0.2541865828, 0.0),
        ("alpha.vit.blocks.23.mlp.fc2.bias", 0.9, 0.0),
        ("alpha.vit.norm.weight", 1.0, 0.0),
        ("beta.mlp.0.weight", 1.0, 1.0),
        ("beta.last.direction", 1.0, 1.0),
        ("beta.last.gain", 1.0, 1.0),
    ],
)
def test_vit_large_gets_the_multipliers_of_the_reference(large: Student, name: str, lr_scale: float, wd_scale: float) -> None:
    group = where(parameter_groups(large, layer_decay=0.9, patch_lr=0.2), name)
    assert group.lr_scale == pytest.approx(lr_scale, rel=1e-9)
    assert group.wd_scale == wd_scale
    assert group.last_layer == name.startswith("beta.last")


def test_vit_large_has_343_tensors_in_52_groups(large: Student) -> None:
    groups = parameter_groups(large.alpha, layer_decay=0.9, patch_lr=0.2)
    assert sum(len(group.params) for group in groups) == 343
    assert len(groups) == 52


def test_without_decay_few_groups_remain(large: Student) -> None:
    groups = parameter_groups(large)
    assert {(g.lr_scale, g.wd_scale, g.last_layer) for g in groups} == {(1.0, 1.0, False), (1.0, 0.0, False), (1.0, 1.0, True)}


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    student = Student(ModelSettings(embed_dim=16, depth=2, num_heads=2, patch_size=4, stem="conv", registers=2), 16)
    student.alpha.vit.pos_embed.requires_grad_(False)
    groups = parameter_groups(student, layer_decay=0.5, patch_lr=0.2)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, p in student.named_parameters() if p.requires_grad)
    named = dict(student.named_parameters())
    assert all(named[n] is p for group in groups for n, p in zip(group.names, group.params, strict=True))


def test_a_conv_stem_is_scaled_like_a_patch_embedding() -> None:
    student = Student(ModelSettings(embed_dim=16, depth=2, num_heads=2, patch_size=4, stem="conv"), 16)
    groups = parameter_groups(student, layer_decay=0.5, patch_lr=0.2)
    stem = {id(p) for p in student.alpha.vit.patch_embed.parameters()}
    assert {g.lr_scale for g in groups for p in g.params if id(p) in stem} == {0.5**3 * 0.2}


def test_a_tower_with_pretrained_weights_has_its_own_multiplier_and_may_start_frozen() -> None:
    student = Student(ModelSettings(embed_dim=8, depth=1, num_heads=2, patch_size=4), 8)
    plain = parameter_groups(student, layer_decay=0.5)
    student.alpha.lr_mult, student.alpha.starts_frozen = 0.1, True
    for group in parameter_groups(student, layer_decay=0.5):
        ours = {name.startswith("alpha.") for name in group.names}
        assert ours == {group.backbone}
        for name in group.names:
            assert group.lr_scale == where(plain, name).lr_scale * (0.1 if group.backbone else 1.0)


def test_attention_pooling_learns_at_the_rate_of_the_last_norm() -> None:
    student = Student(ModelSettings(embed_dim=8, depth=1, num_heads=2, patch_size=4, pooling="attention"), 8)
    groups = parameter_groups(student, layer_decay=0.5)
    assert where(groups, "alpha.vit.attn_pool.latent").lr_scale == where(groups, "alpha.vit.norm.weight").lr_scale == 1.0
