"""Builds the method that ``method.name`` names: function ``build`` of ``pipeline/methods/<name>/method.py``."""

from __future__ import annotations

import importlib

import torch

from pipeline.config.schema import METHODS, Config
from pipeline.errors import ConfigError
from pipeline.methods.base import Method


def build_method(config: Config) -> Method:
    """The method that ``method.name`` names, with fresh weights from torch's current random state.

    Raises:
        ConfigError: settings exist for the name, but no method, or they are of another one.
    """
    name, module = config.method.name, f"{__package__}.{config.method.name}.method"
    if not isinstance(config.method, METHODS.get(name, type(None))):
        raise ConfigError(
            f"no method {name!r} has these settings", where="method.name", hint=f"choose one of {', '.join(sorted(METHODS))}"
        )
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(f"no method {name!r}", where="method.name", hint=f"write {module}, or choose another") from None
    method: Method = found.build(config, config.method)
    return method


def build_seeded_method(config: Config, device: torch.device) -> Method:
    """The method with its initial weights, a function of ``run.seed`` alone, on the device."""
    torch.manual_seed(config.run.seed)
    return build_method(config).to(device).place(device)
