"""``recipe.name: x`` is settings in ``pipeline/methods/x.py`` and a function ``build`` in ``pipeline/recipes/x.py``."""

from __future__ import annotations

import importlib

from pipeline.errors import ConfigError
from pipeline.methods import RECIPES
from pipeline.recipes.base import Recipe
from pipeline.settings import Config


def build_recipe(config: Config) -> Recipe:
    """The method that ``recipe.name`` names, with fresh weights from torch's current random state.

    Raises:
        ConfigError: settings exist for the name, but no method, or they are of another one.
    """
    name, module = config.recipe.name, f"{__package__}.{config.recipe.name}"
    if not isinstance(config.recipe, RECIPES.get(name, type(None))):
        raise ConfigError(
            f"no method {name!r} has these settings", where="recipe.name", hint=f"choose one of {', '.join(sorted(RECIPES))}"
        )
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(f"no method {name!r}", where="recipe.name", hint=f"write {module}, or choose another") from None
    recipe: Recipe = found.build(config, config.recipe)
    return recipe
