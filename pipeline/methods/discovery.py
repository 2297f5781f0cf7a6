"""Finds the methods: every folder beside this file with a ``settings.py``. Imports no torch."""

from __future__ import annotations

import importlib
from pathlib import Path

from pipeline.methods.settings import REGISTERED, RecipeSettings


def _found() -> dict[str, type[RecipeSettings]]:
    """Settings of all methods by name, in alphabetical order."""
    for file in sorted(Path(__file__).parent.glob("*/settings.py")):
        importlib.import_module(f"{__package__}.{file.parent.name}.settings")
    return dict(sorted(REGISTERED.items()))


RECIPES = _found()
