"""Prepares a method whose vision tower begins with pretrained weights."""

from __future__ import annotations

from pipeline.methods.base import Method
from pipeline.models.vision import VisionTower
from pipeline.weights.settings import AdaptSettings


def adapted(method: Method, settings: AdaptSettings) -> Method:
    """Applies the settings to the towers that the method trains, before an engine wraps it; returns the method."""
    for tower in (m for m in method.modules() if isinstance(m, VisionTower) and any(p.requires_grad for p in m.parameters())):
        tower.lr_mult = settings.backbone_lr_mult
        tower.starts_frozen = settings.freeze_backbone.amount > 0
    return method
