"""Builds the method selected by ``method.name``, with function ``build`` of ``pipeline/methods/<name>/method.py``."""

from __future__ import annotations

import importlib

import torch

from pipeline.config.schema import METHODS, Config
from pipeline.errors import ConfigError
from pipeline.methods.adaptation import adapted
from pipeline.methods.base import Method
from pipeline.methods.guidance import guided


def build_method(config: Config) -> Method:
    """Builds the method selected by ``method.name``, initialized from torch's current random state.

    Raises:
        ConfigError: the name has settings but no method, or the settings belong to another method.
    """
    name, module = config.method.name, f"{__package__}.{config.method.name}.method"
    if not isinstance(config.method, METHODS.get(name, type(None))):
        raise ConfigError(
            f"no method {name!r} has these settings", where="method.name", hint=f"Choose one of {', '.join(sorted(METHODS))}"
        )
    try:
        package = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(f"no method {name!r}", where="method.name", hint=f"Write {module}, or choose another") from None
    channels = config.data.channels
    if channels is not None:
        config = config.replace(model=config.model.model_copy(update={"in_channels": channels.count}))
    method: Method = package.build(config, config.method)
    if len(method.curriculum) != len(config.method.views.curriculum):
        hint = "Leave it empty, or let the method set Method.curriculum"
        raise ConfigError(f"{name} has no stages of views", where="method.views.curriculum", hint=hint)
    return guided(adapted(method.of_channels(channels), config.adapt), config.guidance)


def build_seeded_method(config: Config, device: torch.device) -> Method:
    """Builds the method on the device, with initial weights that depend only on ``run.seed``."""
    torch.manual_seed(config.run.seed)
    return build_method(config).to(device).move_state(device)
