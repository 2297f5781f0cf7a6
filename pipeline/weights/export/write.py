"""Writes an export folder atomically: weights, preprocessing and model card."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.weights.export import formats
from pipeline.weights.export.card import card
from pipeline.weights.export.networks import Networks

FORMATS = sorted(file.stem for file in Path(formats.__path__[0]).glob("*.py") if file.stem != "__init__")
"""Names of the export formats: of all modules in :mod:`pipeline.weights.export.formats`."""
_LIBRARIES = {"huggingface": "transformers"}


def write(networks: Networks, format_: str, folder: Path, *, license_: str = "unknown", overwrite: bool = False) -> Path:
    """Writes an export.

    Args:
        networks: what to write.
        format_: one of :data:`FORMATS`.
        folder: output folder; created if it does not exist.
        license_: licence identifier for the card, as used by Hugging Face.
        overwrite: replace an existing export.

    Returns:
        The folder.

    Raises:
        ConfigError: unknown format, a folder that is not empty, or a format that does not support these networks.
    """
    if format_ not in FORMATS:
        raise ConfigError(f"{format_!r} is not an export format", where="--to", hint=f"Choose one of {', '.join(FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ConfigError("exists already", where=str(folder), hint="Name another folder, or give --overwrite")
    temporary = folder.with_name(f".new-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # Writes its files; returns the lines that load them, and notes for the card.
        usage, notes = importlib.import_module(f"{formats.__name__}.{format_}").write(networks, temporary)
        usage = usage.replace(str(temporary), folder.name)
        name = f"{networks.config.run.name}, {networks.saved.path.name}"
        text = card(networks, layout=_LIBRARIES.get(format_, format_), usage=usage, notes=notes, license_=license_, name=name)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        if folder.is_dir():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
