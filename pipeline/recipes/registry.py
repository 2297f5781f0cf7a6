"""From settings to a method: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import ConfigError
from pipeline.models.vision import build_tower
from pipeline.recipes.base import Recipe
from pipeline.recipes.dinov2 import DINOv2
from pipeline.settings import Config, Dinov2Settings


def _dinov2(config: Config) -> Recipe:
    settings = config.recipe
    if not isinstance(settings, Dinov2Settings):
        raise ConfigError(f"settings of {settings.name!r} are not DINOv2's", where="recipe.name")
    return DINOv2(build_tower(config.model, image_size=settings.views.global_size), settings)


_BUILDERS: dict[str, Callable[[Config], Recipe]] = {"dinov2": _dinov2}


def build_recipe(config: Config) -> Recipe:
    """The method that ``recipe.name`` names, with fresh weights from torch's current random state.

    Raises:
        ConfigError: settings exist for the name, but no method.
    """
    try:
        builder = _BUILDERS[config.recipe.name]
    except KeyError:
        raise ConfigError(
            f"no method {config.recipe.name!r}", where="recipe.name", mend=f"choose one of {', '.join(_BUILDERS)}"
        ) from None
    return builder(config)
