"""Data of a run, and the same data as a library for any training loop.

    from pipeline.data import ShardDataset

The names below are imported when they are first used, so that ``import pipeline.data`` loads neither torch nor DALI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.augment.operators import Augment
    from pipeline.data.augment.views import TextSpec, ViewSpec, ViewStage
    from pipeline.data.shard_dataset import ShardDataset
    from pipeline.data.shard_loader import ShardLoader
    from pipeline.data.shard_source import ShardSource
    from pipeline.data.view_loader import ViewLoader

__all__ = ["Augment", "ShardDataset", "ShardLoader", "ShardSource", "TextSpec", "ViewLoader", "ViewSpec", "ViewStage"]
_MODULES = {
    "Augment": "augment.operators",
    "ShardDataset": "shard_dataset",
    "ShardLoader": "shard_loader",
    "ShardSource": "shard_source",
    "TextSpec": "augment.views",
    "ViewLoader": "view_loader",
    "ViewSpec": "augment.views",
    "ViewStage": "augment.views",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
