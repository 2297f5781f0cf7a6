"""Describes pretrained weights: architecture, image size, normalization and heads, without loading them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.checkpoint.files import verify
from pipeline.config.schema import Config
from pipeline.config.sizes import Size
from pipeline.errors import CheckpointError
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.models.settings import ModelSettings
from pipeline.weights.architecture import Architecture, Hints, architecture_of
from pipeline.weights.export.networks import settings_of
from pipeline.weights.folder_hints import FILES, hints_of, of_timm_name
from pipeline.weights.foreign_names import renamed
from pipeline.weights.init_from import Source, find, weights_of
from pipeline.weights.public_layouts import unwrapped

_OF_TRAINING = {"drop_path", "drop_path_schedule", "batched_drop_path", "init"}  # settings that weights do not depend on


@dataclass(frozen=True)
class Described:
    """Pretrained weights as the start of a run.

    Attributes:
        source: where they are.
        architecture: the vision tower.
        method: settings of the method whose heads the weights include; ``None`` if there are none, or of another method.
        parameters: number of the tower's parameters.
        notes: what was recognized, converted or left out.
        run: settings of the run whose heads are used; ``None`` without such heads.
    """

    source: Source
    architecture: Architecture
    method: Dinov2Settings | None
    parameters: int
    notes: tuple[str, ...]
    run: Config | None = None


def describe(name: str, overrides: Mapping[str, Any]) -> Described:
    """Reads what weights are, from shapes and from the settings beside them.

    Args:
        name: fovea run or checkpoint, file or folder of weights, or ``timm:NAME``.
        overrides: settings of the section ``model`` that the user gives, for what weights do not show.

    Raises:
        CheckpointError: the weights are missing, damaged, hold Python objects, or are not of a supported vision transformer.
    """
    source = find(name)
    if source.saved is not None:
        return _of_checkpoint(source)
    where = f"--from {name}"
    state, notes = unwrapped(weights_of(source, shapes_only=True))
    hints = _hints(source, where)
    if supplied := {key: value for key, value in overrides.items() if key in ModelSettings.model_fields}:
        hints = replace(hints, model={**hints.model, **supplied}, source=hints.source or "the command line")
    foreign = renamed(state)
    if hints.complete:
        model = {key: value for key, value in hints.model.items() if key not in _OF_TRAINING}
        architecture = _own(model, hints.image_size or 224, hints.normalize or "imagenet", hints.source)
    else:
        architecture = architecture_of(foreign, hints, where=where)
    if name_of_timm := hints.model.get("timm_name"):
        reasons = {key: why for key, why in architecture.reasons.items() if not key.startswith("model.")}
        reasons["model.timm_name"] = hints.source
        architecture = replace(architecture, model={"timm_name": name_of_timm}, reasons=reasons)
        if hints.image_size:
            architecture = replace(architecture, image_size=hints.image_size)
    parameters = sum(math.prod(tensor.shape) for tensor in foreign.tensors.values())
    return Described(source, architecture, None, parameters, (*notes, *foreign.notes))


def _hints(source: Source, where: str) -> Hints:
    if source.kind == "timm":
        name = source.name.removeprefix("timm:")
        hints = of_timm_name(name, where=where)
        return replace(hints, model={"timm_name": name})
    assert source.path is not None
    if source.kind == "folder":
        return hints_of(source.path)
    return hints_of(source.path.parent) if source.path.name in FILES else Hints()


def _of_checkpoint(source: Source) -> Described:
    """A checkpoint of fovea knows its settings; its heads are used if they are DINOv2's."""
    saved = source.saved
    assert saved is not None
    verify(saved)
    config = settings_of(saved)
    if "resnet" in (config.model.timm_name or ""):
        raise CheckpointError(
            "the run trained a ResNet, and only vision transformers are adapted",
            where=f"--from {source.name}",
            hint="Choose a run with a vision transformer",
        )
    model = config.model.model_dump(exclude_defaults=True, exclude=_OF_TRAINING)
    method = config.method
    why = f"the settings of {source.path or source.name}"
    architecture = _own(model, method.views.global_size, method.augment.normalize, why)
    parameters = sum(math.prod(shape) for name, shape in saved.manifest.get("shapes", {}).items() if name.startswith("backbone."))
    heads = method if type(method) is Dinov2Settings else None
    notes = () if heads else (f"the heads of {method.name} are left out: DINOv2's are new",)
    return Described(source, architecture, heads, parameters, notes, config if heads else None)


def _own(model: dict[str, Any], size: Size, normalize: str, why: str) -> Architecture:
    """The architecture that fovea's own settings name."""
    keys = [f"model.{key}" for key in model]
    return Architecture(
        "fovea", model, size, normalize, dict.fromkeys([*keys, "method.views.global_size", "method.augment.normalize"], why)
    )
