"""Attaches guidance by metadata to a method: reads the class tokens that its student computes anyway, and adds terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.methods.base import Method
from pipeline.methods.shared.guidance import Guidance
from pipeline.methods.shared.guidance_settings import GuidanceSettings
from pipeline.models.vision import VisionTower


def guided(method: Method, settings: GuidanceSettings) -> Method:
    """Adds the terms of the settings' columns to those of the method; without columns, nothing changes. Returns the method.

    Called before initial weights are loaded, and before an engine wraps the method. The terms see the class tokens of all global
    crops as the student computes them in the method's forward pass (DINOv2's are of masked crops), which costs no other pass.

    Raises:
        ConfigError: the method does not train one vision transformer called ``backbone``.
    """
    if not settings.columns:
        return method
    students = [
        name
        for name, tower in method.named_modules()
        if isinstance(tower, VisionTower) and any(p.requires_grad for p in tower.parameters())
    ]
    tower = getattr(method, "backbone", None)
    if students != ["backbone"] or not isinstance(tower, VisionTower):
        raise ConfigError(
            f"the method trains {len(students)} vision transformers, and one that is called backbone is guided",
            where="guidance.columns",
            hint="Leave it empty, or choose a method with one student, such as dinov2",
        )
    guidance = method.guidance = Guidance(settings, tower.width)
    method.extra_state |= guidance.initial_state()
    seen: list[Tensor] = []
    begun: list[bool] = []

    def begin(*_: Any) -> None:
        seen.clear()
        begun.append(True)

    def see(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], tokens: Any) -> None:
        if begun and torch.is_grad_enabled() and not options.get("local"):
            seen.append(tokens.cls)

    def add_terms(_: nn.Module, arguments: tuple[Any, ...], terms: dict[str, Tensor]) -> dict[str, Tensor]:
        begun.clear()
        added, metrics = guidance(torch.cat(seen), arguments[0].columns, method.extra_state)
        seen.clear()
        method.metrics = {**method.metrics, **metrics}
        return terms | added

    method.register_forward_pre_hook(begin)
    tower.register_forward_hook(see, with_kwargs=True)
    method.register_forward_hook(add_terms, prepend=True)  # before other terms are computed from passes of their own
    return method
