"""Imports timm without Weights & Biases; to be imported before timm itself.

timm imports that package wherever it is installed, which costs each start a third of a CPU second and is never used.
"""

from __future__ import annotations

import sys

_tracker = sys.modules.get("wandb")
sys.modules["wandb"] = _tracker  # type: ignore[assignment]
import timm  # noqa: E402, F401

if _tracker is None:
    del sys.modules["wandb"]
