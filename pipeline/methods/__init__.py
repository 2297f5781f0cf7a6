"""What a person can set of each method: one file a method, pydantic only. Their formulas are in :mod:`pipeline.recipes`."""

from pipeline.methods.base import RECIPES, AugmentSettings, RecipeSettings, ViewSettings, register
from pipeline.methods.byol import ByolSettings
from pipeline.methods.clip import ClipSettings, ContrastiveSettings, TextSettings
from pipeline.methods.coca import CocaSettings
from pipeline.methods.detailclip import DetailClipSettings
from pipeline.methods.dino import DinoSettings
from pipeline.methods.dinov2 import Dinov2Settings
from pipeline.methods.distill import DistillSettings
from pipeline.methods.mocov2 import Mocov2Settings
from pipeline.methods.mocov3 import Mocov3Settings
from pipeline.methods.simclr import SimclrSettings
from pipeline.methods.simvlm import SimvlmSettings
from pipeline.methods.twoviews import ColourSettings, RepelSettings, TwoViewSettings

__all__ = [
    "RECIPES",
    "AugmentSettings",
    "ByolSettings",
    "ClipSettings",
    "CocaSettings",
    "ColourSettings",
    "ContrastiveSettings",
    "DetailClipSettings",
    "DinoSettings",
    "Dinov2Settings",
    "DistillSettings",
    "Mocov2Settings",
    "Mocov3Settings",
    "RecipeSettings",
    "RepelSettings",
    "SimclrSettings",
    "SimvlmSettings",
    "TextSettings",
    "TwoViewSettings",
    "ViewSettings",
    "register",
]
