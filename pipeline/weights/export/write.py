"""Writes an export folder atomically: weights, preprocessing and model card."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.weights.export import huggingface as to_huggingface
from pipeline.weights.export import onnx as to_onnx
from pipeline.weights.export import open_clip as to_open_clip
from pipeline.weights.export import safetensors as to_safetensors
from pipeline.weights.export import timm as to_timm
from pipeline.weights.export.card import card
from pipeline.weights.export.networks import Networks

TARGETS: dict[str, Callable[[Networks, Path], tuple[str, list[str]]]] = {
    "timm": to_timm.write,
    "huggingface": to_huggingface.write,
    "open_clip": to_open_clip.write,
    "onnx": to_onnx.write,
    "safetensors": to_safetensors.write,
}
"""Export layouts by name. Each writes its files and returns the lines that load them, and notes for the card."""
_LIBRARIES = {"huggingface": "transformers"}


def write(networks: Networks, target: str, folder: Path, *, license_: str = "unknown", overwrite: bool = False) -> Path:
    """Writes an export.

    Args:
        networks: what to write.
        target: one of :data:`TARGETS`.
        folder: output folder; created if it does not exist.
        license_: licence identifier for the card, as used by Hugging Face.
        overwrite: replace an existing export.

    Returns:
        The folder.

    Raises:
        ConfigError: unknown target, a folder that is not empty, or a target that does not support these networks.
    """
    if target not in TARGETS:
        raise ConfigError(f"there is no target {target!r}", where="--to", hint=f"Choose one of {', '.join(TARGETS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ConfigError("exists already", where=str(folder), hint="Name another folder, or give --overwrite")
    temporary = folder.with_name(f".new-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        usage, notes = TARGETS[target](networks, temporary)
        usage = usage.replace(str(temporary), folder.name)
        name = f"{networks.config.run.name}, {networks.saved.path.name}"
        text = card(networks, layout=_LIBRARIES.get(target, target), usage=usage, notes=notes, license_=license_, name=name)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        if folder.is_dir():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
