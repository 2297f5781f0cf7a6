"""Prepares a method whose vision tower begins with pretrained weights: what of it is trained, and at which rate."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import losses
from pipeline.errors import ConfigError
from pipeline.methods.base import Method
from pipeline.methods.shared.frozen import Frozen
from pipeline.models.lora import add_lora
from pipeline.models.vision import VisionTower
from pipeline.weights.settings import AdaptSettings


def adapted(method: Method, settings: AdaptSettings) -> Method:
    """Applies the settings to the towers that the method trains and to their teachers; returns the method.

    Called before initial weights are loaded, and before an engine wraps the method.

    Raises:
        ConfigError: the tower has no more blocks than are to be trained, or a rank that is too large.
    """
    if settings.keeps_start:
        _keep_start(method, settings)
    students = {name: tower for name, tower in _towers(method) if any(p.requires_grad for p in tower.parameters())}
    for name, tower in students.items():
        tower.lr_mult = settings.backbone_lr_mult
        tower.starts_frozen = settings.freeze_backbone.amount > 0
        if settings.train == "all":
            continue
        _restrict(tower, settings)
        method.constant_names |= {f"{name}.{inner}" for inner, p in tower.named_parameters() if not p.requires_grad}
    if settings.train == "lora" and method.teacher is not None:
        for name, module in method.teacher.modules.items():
            for inner, tower in _towers(module):
                if f"{name}.{inner}".rstrip(".") in students:
                    _restrict(tower, settings)
            module.requires_grad_(False)
        method.teacher.reset()
    return method


def _keep_start(method: Method, settings: AdaptSettings) -> None:
    """Adds a frozen copy of the tower, which is filled when initial weights are loaded, and the terms that compare with it."""
    students = {name: tower for name, tower in _towers(method) if any(p.requires_grad for p in tower.parameters())}
    if list(students) != ["backbone"]:
        raise ConfigError(
            f"the method trains {len(students)} vision towers, and one that is called backbone has a start to keep",
            where="adapt",
            hint="Set adapt.preserve_cls, preserve_patches and l2_to_start to 0",
        )
    tower = students["backbone"]
    method.start = Frozen(backbone=copy.deepcopy(tower))
    method.constant_names |= {f"start.{name}" for name, _ in method.start.named_parameters()}
    if not settings.preserve_cls and not settings.preserve_patches:
        return
    view = method.views[0].name

    def add_terms(_: nn.Module, arguments: tuple[Any, ...], terms: dict[str, Tensor]) -> dict[str, Tensor]:
        images = arguments[0].views[view][0]
        with torch.no_grad():
            before = method.start["backbone"](images)  # type: ignore[index]
        now = tower(images)
        added = {"preserve_cls": settings.preserve_cls * losses.feature_distance(now.cls, before.cls)}
        if settings.preserve_patches:
            added["preserve_patches"] = settings.preserve_patches * losses.gram(now.patches, before.patches)
        return terms | {name: term for name, term in added.items() if getattr(settings, name)}

    method.register_forward_hook(add_terms)  # registered before an engine's own hooks, so that it runs within its forward pass


def _towers(root: nn.Module) -> list[tuple[str, VisionTower]]:
    return [(name, module) for name, module in root.named_modules() if isinstance(module, VisionTower)]


def _restrict(tower: VisionTower, settings: AdaptSettings) -> None:
    """Freezes what is not trained."""
    if settings.train == "lora":
        lora = settings.lora
        add_lora(tower, lora.projections, rank=lora.rank, alpha=lora.alpha, train_down=lora.train_down)
        return
    blocks = list(tower.vit.blocks)
    if settings.last_blocks >= len(blocks):
        raise ConfigError(
            f"the tower has {len(blocks)} blocks",
            where="adapt.last_blocks",
            hint=f"Choose a number below {len(blocks)}, or adapt.train=all",
        )
    for parameter in tower.parameters():
        parameter.requires_grad_(False)
    tower.mask_token.requires_grad_(True)
    for part in (*blocks[-settings.last_blocks :], tower.vit.norm, tower.local_norm, getattr(tower.vit, "attn_pool", None)):
        if part is not None:
            part.requires_grad_(True)
