"""What a person can set of each method: one file a method, pydantic only. Their formulas are in :mod:`pipeline.recipes`."""

from pipeline.methods.base import RECIPES, AugmentSettings, RecipeSettings, ViewSettings, register
from pipeline.methods.clip import ClipSettings, ContrastiveSettings, TextSettings
from pipeline.methods.detailclip import DetailClipSettings
from pipeline.methods.dinov2 import Dinov2Settings
from pipeline.methods.distill import DistillSettings

__all__ = [
    "RECIPES",
    "AugmentSettings",
    "ClipSettings",
    "ContrastiveSettings",
    "DetailClipSettings",
    "Dinov2Settings",
    "DistillSettings",
    "RecipeSettings",
    "TextSettings",
    "ViewSettings",
    "register",
]
