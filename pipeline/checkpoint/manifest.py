"""Reads a checkpoint's ``manifest.json`` and validates types, bounds and file names. Does not import torch.

A checkpoint folder may come from an untrusted source, so all shapes, numbers and names are validated here, once; code after
this point can rely on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.upgrade import upgrade
from pipeline.errors import CheckpointError
from pipeline.untrusted import plain_name, printable, read_json

if TYPE_CHECKING:
    from pydantic import ValidationError

FORMAT = 1
MANIFEST = "manifest.json"
UNSHARDED = "whole.safetensors"
FIXED = "fixed.safetensors"
MAX_MANIFEST = 256 << 20  # bytes
_MAX_ELEMENTS = 1 << 50  # maximum elements of a tensor
_HINT = "Choose another: this checkpoint is damaged or not to be trusted"


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads and validates a checkpoint's ``manifest.json``; renames old settings to their current names.

    Args:
        path: a regular file of at most 256 MiB.

    Raises:
        CheckpointError: it cannot be read, or a value has a wrong type, is out of bounds or is not a plain file name.
    """
    try:
        document = read_json(path, limit=MAX_MANIFEST, error=CheckpointError)
    except (OSError, CheckpointError) as error:
        reason = error.what if isinstance(error, CheckpointError) else error.strerror
        raise CheckpointError(
            f"not a complete checkpoint: its manifest cannot be read ({reason})",
            where=printable(str(path)),
            hint="Name a directory checkpoints/step_… of a run",
        ) from None
    if isinstance(document, dict) and isinstance(document.get("config"), dict):
        document["config"] = upgrade(document["config"])
    return check_manifest(document, where=printable(str(path)))


def check_manifest(document: Any, *, where: str) -> dict[str, Any]:
    """Validates a manifest and returns it; of a manifest in another format only the fields common to all formats.

    Raises:
        CheckpointError: as :func:`read_manifest`.
    """
    if not isinstance(document, dict) or not document.keys() >= {"format", "step", "files"}:
        raise CheckpointError(
            "not a checkpoint: the manifest describes something else",
            where=where,
            hint="Name a directory checkpoints/step_… of a run",
        )
    from pydantic import ValidationError

    from pipeline.checkpoint.manifest_types import (
        Head,
        Manifest,
    )  # imported here so that only commands that read a manifest pay for importing pydantic

    kind: type[Head] = Manifest if document["format"] == FORMAT else Head
    try:
        checked = kind.model_validate(document)
    except (ValidationError, RecursionError) as error:
        raise CheckpointError(f"its manifest is invalid ({_first(error)})", where=where, hint=_HINT) from None
    _check_files([file.name for file in checked.files], where)
    if isinstance(checked, Manifest):
        _check_tensors(document, where)
        return document
    return {name: document[name] for name in Head.model_fields if name in document}


def _first(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    one = error.errors(include_url=False, include_context=False)[0]
    return printable(f"{'.'.join(map(str, one['loc']))}: {one['msg']}", limit=160)


def _check_files(names: list[str], where: str) -> None:
    for name in names:
        plain_name(name, where=where, error=CheckpointError)
    if len(set(names)) < len(names) or MANIFEST in names:
        raise CheckpointError("its manifest is invalid (files: one is named twice, or is the manifest)", where=where, hint=_HINT)


def _check_tensors(document: Mapping[str, Any], where: str) -> None:
    if any(math.prod(shape) > _MAX_ELEMENTS for shape in document.get("shapes", {}).values()):
        raise CheckpointError("its manifest is invalid (shapes: a tensor is too large)", where=where, hint=_HINT)
    if fragments := document.get("fragments"):
        listed = {file["name"] for file in document["files"]}
        needed = {UNSHARDED, *(f"rank_{rank:05d}.safetensors" for rank in range(len(fragments)))}
        if missing := sorted(needed - listed):
            raise CheckpointError(f"its manifest is invalid (files: {missing[0]} is not listed)", where=where, hint=_HINT)
