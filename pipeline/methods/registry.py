"""Builds the method that ``method.name`` names: function ``build`` of ``pipeline/methods/<name>/method.py``."""

from __future__ import annotations

import importlib

import torch

from pipeline.config.schema import RECIPES, Config
from pipeline.errors import ConfigError
from pipeline.methods.base import Recipe


def build_recipe(config: Config) -> Recipe:
    """The method that ``method.name`` names, with fresh weights from torch's current random state.

    Raises:
        ConfigError: settings exist for the name, but no method, or they are of another one.
    """
    name, module = config.method.name, f"{__package__}.{config.method.name}.method"
    if not isinstance(config.method, RECIPES.get(name, type(None))):
        raise ConfigError(
            f"no method {name!r} has these settings", where="method.name", hint=f"choose one of {', '.join(sorted(RECIPES))}"
        )
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(f"no method {name!r}", where="method.name", hint=f"write {module}, or choose another") from None
    recipe: Recipe = found.build(config, config.method)
    return recipe


def make_recipe(config: Config, device: torch.device) -> Recipe:
    """The method with its initial weights, a function of ``run.seed`` alone, on the device."""
    torch.manual_seed(config.run.seed)
    return build_recipe(config).to(device).place(device)
