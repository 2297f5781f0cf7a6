"""Safetensors export: all networks in one file under fovea's own names, readable by ``fovea eval`` and ``init_from``."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from pipeline.models.resnet import ResNetTower
from pipeline.weights.export.networks import Networks, meta


def write(networks: Networks, folder: Path) -> tuple[str, list[str]]:
    """Writes ``model.safetensors`` and ``config.json`` to a folder; returns lines of Python that load them, and notes."""
    save_file(networks.state(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"fovea": meta(networks.config)}, indent=1) + "\n")
    inner = "net" if isinstance(networks.tower, ResNetTower) else "vit"
    usage = f"""
from safetensors.torch import load_file
weights = load_file("{folder / "model.safetensors"}")
tower = {{name.removeprefix("backbone."): tensor for name, tensor in weights.items() if name.startswith("backbone.")}}
"""
    note = f"`backbone.{inner}.` holds the tensors of timm's model"
    return usage, [f"{note}; the file is also an `init_from.source` of fovea." if inner == "vit" else f"{note}."]
