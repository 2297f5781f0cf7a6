"""Safetensors export: all networks in one file under fovea's own names, readable by ``fovea eval`` and ``init_from``."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from pipeline.weights.export.networks import Networks, meta


def write(networks: Networks, folder: Path) -> tuple[str, list[str]]:
    """Writes ``model.safetensors`` and ``config.json`` to a folder; returns lines of Python that load them, and notes."""
    save_file(networks.state(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"fovea": meta(networks.config)}, indent=1) + "\n")
    usage = f"""
from safetensors.torch import load_file
weights = load_file("{folder / "model.safetensors"}")
tower = {{name.removeprefix("backbone."): tensor for name, tensor in weights.items() if name.startswith("backbone.")}}
"""
    return usage, ["`backbone.vit.` holds the tensors of timm's model; the file is also an `init_from.source` of fovea."]
