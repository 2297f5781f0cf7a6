"""Checkpoints as one rank writes them, of methods small enough for tests, and their settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.checkpoint.files import Saved, entry, read
from pipeline.config.schema import Config
from pipeline.methods.base import Method
from pipeline.methods.registry import build_method

DINO: dict[str, Any] = {
    "name": "dinov2",
    "views": {"global_size": 32, "local_count": 0, "local_size": 16},
    "prototypes": 16,
    "head_hidden": 8,
    "head_bottleneck": 8,
}
CLIP: dict[str, Any] = {
    "name": "clip",
    "views": {"global_size": 32},
    "embed_dim": 12,
    "text": {"architecture": None, "width": 16, "depth": 2, "num_heads": 2, "context_length": 16},
}
MODEL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def settings(method: dict[str, Any], **model: Any) -> Config:
    return Config.model_validate(
        {"run": {"name": "toy"}, "method": method, "model": {**MODEL, **model}, "data": {"shards": ["nowhere.tar"]}}
    )


def checkpoint(folder: Path, config: Config, *, step: int = 3) -> tuple[Saved, Method]:
    """A checkpoint with weights that no seed gives, teacher and student different; and the method that holds them."""
    method = build_method(config).eval()
    generator = torch.Generator().manual_seed(9)
    students = dict(method.named_parameters())
    teachers = dict(method.teacher.named_parameters()) if method.teacher is not None else {}
    with torch.no_grad():
        for weight in (*students.values(), *teachers.values()):
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    place = folder / "checkpoints" / f"step_{step:09d}"
    place.mkdir(parents=True)
    trained = {name: p for name, p in students.items() if p.requires_grad}
    pieces = {f"master/{name}": t.detach().flatten() for name, t in trained.items()}
    pieces |= {f"teacher/{name}": t.detach().flatten() for name, t in teachers.items() if name in trained}
    whole = {f"frozen/{name}": p.detach() for name, p in students.items() if not p.requires_grad}
    whole |= {f"teacher/{name}": p.detach() for name, p in teachers.items() if name not in trained}
    if method.teacher is not None:
        whole |= {f"teacher/{name}": t for name, t in method.teacher.named_buffers()}
    save_file({name: t.clone() for name, t in pieces.items()}, place / "rank_00000.safetensors")
    save_file({name: t.clone() for name, t in whole.items()}, place / "whole.safetensors")
    manifest = {
        "format": 1,
        "step": step,
        "applied": step,
        "skipped": 0,
        "samples_seen": 16 * step,
        "scores": {"knn/k20": 0.5},
        "scored": step,
        "config": config.model_dump(mode="json"),
        "data": {"samples": 40, "fingerprint": "f00d"},
        "world": 1,
        "shapes": {name: list(p.shape) for name, p in trained.items()},
        "fragments": [{name: [0, p.numel()] for name, p in trained.items()}],
        "files": [entry(place / "rank_00000.safetensors"), entry(place / "whole.safetensors")],
    }
    (place / "manifest.json").write_text(json.dumps(manifest))
    return read(place), method
