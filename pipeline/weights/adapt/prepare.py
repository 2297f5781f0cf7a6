"""From images and weights to a config file: counts the images, describes the weights, chooses settings, checks that they fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipeline.config.layers import Branch, Problem, grown, merge, override, unwrap
from pipeline.config.load import Loaded, load, problems_of
from pipeline.config.paths import absolute, patterns
from pipeline.config.schema import Config
from pipeline.config.sizes import size_text
from pipeline.data.index.image_header import open_header, sniff
from pipeline.data.index.manifest import Manifest
from pipeline.data.indexing import Progress, indexed, open_storage
from pipeline.data.loader.reader import Reader
from pipeline.errors import ConfigError, DataError
from pipeline.weights.adapt.columns import guides_of
from pipeline.weights.adapt.describe import describe
from pipeline.weights.adapt.plan import Images, Plan, Replay, check_length, make_plan
from pipeline.weights.adapt.text import COMMAND_LINE, command_line, config_text

FILE = "adapt.yaml"
_INSPECTED = 64  # images whose number of channels is looked at
_GRAY = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L"}
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Prepared:
    """A run that can be started.

    Attributes:
        file: the config.
        text: its content.
        plan: what was chosen.
        images: number of images.
        notes: what was recognized, converted or left out.
    """

    file: Path
    text: str
    plan: Plan
    images: int
    notes: tuple[str, ...]


def prepare(
    shards: Sequence[str],
    weights: str,
    directory: Path,
    overrides: Sequence[str],
    *,
    train: str,
    columns: Sequence[tuple[str, str]] = (),
    command: Sequence[str],
    progress: Progress | None = None,
    replay: tuple[str, float] | None = None,
) -> Prepared:
    """Chooses the settings of a run; writes nothing but the index of the shards.

    Args:
        shards: patterns of the training shards.
        weights: the weights, see :func:`pipeline.weights.init_from.find`.
        directory: run directory.
        overrides: ``KEY=VALUE`` settings that replace chosen ones.
        train: part of the tower that is trained, as in ``adapt.train``.
        columns: columns of the samples' JSON that guide the run, each with ``discourage`` or ``encourage``.
        command: the whole command line after ``fovea``, for the header.
        progress: called for each shard indexed.
        replay: pattern of old shards that are shown along, and their share of the samples.

    Raises:
        FoveaError: the weights cannot be trained on, or there are too few images.
    """
    problems: list[Problem] = []
    overriding = Branch({}, "command line")
    for text in overrides:
        merge(overriding, override(text, problems))
    if problems:
        raise ConfigError(problems[0].message, hint="Write settings as KEY=VALUE after the shards")
    _check(overriding, shards)
    described = describe(weights, unwrap(overriding).get("model", {}))
    images, manifest = _images(shards, unwrap(overriding), progress)
    guides = guides_of(columns, manifest, _probe(shards, unwrap(overriding)), already_set="guidance" in unwrap(overriding))
    source = absolute(weights, "name")
    name = directory.resolve().name.lstrip("._-+") or "adapted"
    plan = make_plan(
        described,
        images,
        name=name,
        directory=os.path.abspath(directory),
        source=source,
        train=train,
        guides=guides,
        own=unwrap(overriding),
        replay=None if replay is None else _replayed(*replay, unwrap(overriding), progress),
    )
    tree = grown(plan.settings, "chosen")
    merge(tree, overriding)
    settings = unwrap(tree)
    reasons = plan.reasons | {key: COMMAND_LINE for key in _keys(unwrap(overriding))}
    a = described.architecture
    text = config_text(
        settings,
        reasons,
        title=f"{settings['method'].get('name', 'dinov2')} on {images.count} images, from {weights}",
        facts=[
            ("command", command_line(command)),
            ("again", f"fovea train {directory / FILE}   (the same command resumes the run)"),
            ("weights", f"layout {a.layout}, {described.parameters:,} parameters, images of {size_text(a.image_size)} pixels"),
            ("images", f"{images.count} in {len(manifest.shards)} shards{', gray' if images.gray else ''}"),
        ],
        notes=described.notes,
    )
    return Prepared(directory / FILE, text, plan, images.count, described.notes)


def _check(overriding: Branch, shards: Sequence[str]) -> None:
    """Refuses settings of the command line whose key, type or value is wrong, before anything is made of them."""
    data = unwrap(overriding).get("data")
    if named := [name for name in ("shards", "sources") if isinstance(data, dict) and name in data]:
        raise ConfigError(
            f"data.{named[0]} would replace the shards that the weights are adapted to",
            where="command line",
            hint="Name the new shards first, after `adapt`, and old ones that are to be shown along with --replay",
        )
    base: dict[str, Any] = {"data": {"shards": list(shards)}}
    if "model" not in unwrap(overriding):
        base["model"] = {"timm_name": "vit_tiny_patch16_224"}
    tree = grown(base, "chosen")
    merge(tree, overriding)
    for problem in problems_of(tree, "command line"):
        if problem.origin == "command line":
            raise ConfigError(problem.message, where=problem.origin, hint="Correct it; `fovea config show` lists all settings")


def loaded(prepared: Prepared) -> Loaded:
    """Reads the written config as ``fovea train`` does, and checks that the weights fit it exactly.

    Raises:
        FoveaError: a setting is refused, or the weights do not fit.
    """
    from pipeline.weights import init_from

    ready = load(prepared.file)
    check_length(ready.config, prepared.images)
    init_from.check(ready.config)
    return ready


def _keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in tree.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return keys


def _images(shards: Sequence[str], overrides: dict[str, Any], progress: Progress | None) -> tuple[Images, Manifest]:
    """Indexes the shards and looks at some images."""
    _check_packed(shards)
    probe = _probe(shards, overrides)
    manifest = indexed(probe, probe.data.patterns, progress)
    count = manifest.total
    spread = np.unique(np.linspace(0, max(count - 1, 0), min(count, _INSPECTED)).astype(np.int64))
    reader = Reader(manifest, wants=("image",), store=open_storage(probe, at_start=True))
    encoded = [record.image for record in reader.fetch(manifest.ids(spread))] if count else []
    modes = [mode for image in encoded if image is not None and (mode := _mode(image))]
    full = patterns(tuple(shards))
    return Images(full, count, bool(modes) and all(mode in _GRAY for mode in modes), _labelled(probe, manifest)), manifest


def _probe(shards: Sequence[str], overrides: dict[str, Any]) -> Config:
    """Settings that read the shards as the run will."""
    data = overrides.get("data", {})
    section = {**data, "shards": list(shards)} if isinstance(data, dict) else {"shards": list(shards)}
    try:
        return Config.model_validate({"model": {"timm_name": "vit_tiny_patch16_224"}, "data": section})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(problem["msg"], where=where, hint="Correct the settings after the shards") from None


def _replayed(pattern: str, share: float, overrides: dict[str, Any], progress: Progress | None) -> Replay:
    """The old shards, indexed.

    Raises:
        DataError: they hold no usable image.
    """
    _check_packed([pattern])
    probe = _probe([pattern], overrides)
    if not indexed(probe, probe.data.patterns, progress).total:
        raise DataError("no usable images", where=pattern, hint="Name shards of old images after --replay")
    return Replay(patterns((pattern,)), share)


def _check_packed(shards: Sequence[str]) -> None:
    for pattern in shards:
        path = Path(pattern)
        if "://" not in pattern and path.is_dir() and not any(path.glob("*.tar")):
            loose = any(file.suffix.lower() in _IMAGES for file in path.rglob("*"))
            raise DataError(
                "the folder holds images, not shards" if loose else "the folder holds no shards (*.tar)",
                where=pattern,
                hint=f"Pack them first: fovea shards pack {pattern} SHARDS"
                if loose
                else "Name a folder or pattern of .tar files",
            )


def _mode(image: bytes) -> str:
    try:
        return str(open_header(image, sniff(image)).mode)
    except Exception:  # a header that was accepted when the shard was indexed; it is not decoded here
        return ""


def _labelled(probe: Config, manifest: Manifest) -> bool:
    """Whether k-NN can be evaluated: labels here, and labelled validation shards beside the training shards."""
    if not manifest.classes:
        return False
    try:
        return indexed(probe, probe.validation_shards).classes > 0
    except DataError:
        return False
