"""Initial weights of a new run (``init_from``), as used to chain training stages.

Read once, at step 0 of a new run, on every rank, before an engine shards anything; a resumed run ignores them. The source is
recorded in the manifest of every following checkpoint (``init``).
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.checkpoint import files as saved
from pipeline.checkpoint import selection
from pipeline.checkpoint.files import Saved
from pipeline.checkpoint.manifest import MANIFEST
from pipeline.checkpoint.reader import read_student, read_teacher
from pipeline.config.schema import Config
from pipeline.config.sizes import Size, grid_of
from pipeline.errors import CheckpointError, ConfigError
from pipeline.methods.base import Method
from pipeline.models.lora import merged_state
from pipeline.models.tensor_files import only_weights, opened, read_tensors, reason
from pipeline.models.vision import VisionTower
from pipeline.untrusted import shown_address
from pipeline.weights.folder_config import size_of
from pipeline.weights.folder_hints import FILES, is_weights, sizes_of, tensors_of
from pipeline.weights.public_layouts import compare, fit, unwrapped
from pipeline.weights.settings import AdaptSettings, InitSettings

_FILES = (".safetensors", ".pth", ".pt", ".bin")
_PROBES = "guidance."  # parameters of a method's guidance, which belong to the columns of its own run


@dataclass(frozen=True)
class Source:
    """The resolved ``init_from.source``.

    Attributes:
        name: as given.
        kind: a fovea checkpoint, a weights file, a folder of another library, or a timm model name.
        path: the checkpoint's directory, the file or the folder.
        saved: the checkpoint.
    """

    name: str
    kind: Literal["checkpoint", "file", "folder", "timm"]
    path: Path | None = None
    saved: Saved | None = None

    def __str__(self) -> str:
        return f"{self.path or self.name}" + (f" (step {self.saved.step})" if self.saved is not None else "")

    def record(self) -> dict[str, Any]:
        """Entry for manifests: path and a unique digest."""
        facts: dict[str, Any] = {"source": self.name, "kind": self.kind}
        if self.saved is not None:
            facts |= {"path": str(self.saved.path.resolve()), "id": self.saved.id, "step": self.saved.step}
        elif self.path is not None:
            facts |= {"path": str(self.path.resolve()), "blake2b": _digest(self.path)}
        return facts


@dataclass(frozen=True)
class Start:
    """Initial weights of a new run.

    Attributes:
        record: entry for the manifest.
        notes: messages to log, among them what was converted or left out.
    """

    record: dict[str, Any]
    notes: tuple[str, ...] = field(default=())


def find(name: str) -> Source:
    """Identifies a source without reading weights.

    Raises:
        CheckpointError: it does not exist, or holds no weights.
    """
    if name.startswith("timm:"):
        return Source(name, "timm")
    path = Path(name)
    if "://" in name:
        raise CheckpointError(
            "must be a local file: weights are not downloaded",
            where=f"init_from.source={name}",
            hint=f"Download them first, `{download_command(name)}`, and give their path",
        )
    if not path.exists():
        raise CheckpointError(
            "there is no such file or directory",
            where=f"init_from.source={name}",
            hint="Give a run, a checkpoint or a file of weights",
        )
    if path.is_file():
        if path.suffix in _FILES:
            return Source(name, "file", path)
    elif (path / MANIFEST).exists():
        return Source(name, "checkpoint", path, saved.read(path))
    else:
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        newest, _ = selection.newest(folder)
        if newest is not None:
            return Source(name, "checkpoint", newest.path, newest)
        if is_weights(path):
            return Source(name, "folder", path)
    raise CheckpointError(
        "not a run with checkpoints, a checkpoint, a file or a folder of weights",
        where=f"init_from.source={name}",
        hint=f"Give a run's directory, one of its checkpoints/step_…, a file that ends in {', '.join(_FILES)}, or a folder with "
        "config.json and weights",
    )


def download_command(url: str) -> str:
    """The command that downloads weights from an address; it contains no user name and no value of a query."""
    address = shown_address(url)
    parts = urlsplit(url)
    if parts.hostname in ("huggingface.co", "hf.co") and (match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/?", parts.path)):
        return f"hf download {match[1]} --local-dir {match[1].split('/')[1]}"
    tool = {"s3": "aws s3 cp", "gs": "gcloud storage cp"}.get(parts.scheme)
    return f"{tool} {shlex.quote(address)} ." if tool else f"curl -LO {shlex.quote(address)}"


def _digest(path: Path) -> str:
    """BLAKE2b of a file, or of the digests of all weights and settings in a folder."""
    if path.is_file():
        return str(saved.entry(path, "blake2b")["blake2b"])
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in (*_FILES, ".json"))
    digests = "".join(f"{file.name} {saved.entry(file, 'blake2b')['blake2b']}\n" for file in files)
    return hashlib.blake2b(digests.encode()).hexdigest()


def check(config: Config) -> None:
    """Checks, without ranks and without reading weights, what :func:`begin` would refuse.

    Raises:
        CheckpointError: the source is missing or damaged, or its names or shapes do not fit the settings.
    """
    from pipeline.methods.registry import build_method

    with torch.device("meta"):
        method = build_method(config)
    for name in {config.init_from.source, *config.method.anchors.values()} - {None}:
        if (saved_run := find(str(name)).saved) is not None:
            saved.verify(saved_run)
    if config.init_from.source is not None:
        _matched(method, find(config.init_from.source), config.init_from, shapes_only=True)
    for name, anchor_source in config.method.anchors.items():
        _anchored(method, name, anchor_source, config.init_from, shapes_only=True)


@torch.no_grad()
def begin(method: Method, config: Config, *, record: bool = True) -> Start | None:
    """Loads the weights that ``init_from`` names into the student, resets the teacher to it, and loads frozen networks.

    Args:
        method: the method with random weights, before an engine wraps it.
        config: the configuration.
        record: whether to compute the source's digest, which one rank may do for all.

    Returns:
        What was loaded, or ``None`` if the settings name no source.

    Raises:
        CheckpointError: as :func:`check`.
    """
    facts: dict[str, Any] = {}
    lines: list[str] = []
    parameters = dict(method.named_parameters())
    if config.init_from.source is not None:
        source = find(config.init_from.source)
        weights, notes = _matched(method, source, config.init_from, shapes_only=False)
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
        if method.teacher is not None:
            method.teacher.reset()
        network = f"{config.init_from.network} of " if source.kind == "checkpoint" else ""
        lines += [f"starting from the {network}{source}: {len(weights)} tensors", *notes]
        if record:
            facts = source.record() | {"network": config.init_from.network, "heads": config.init_from.heads}
    if method.start is not None:
        for name, parameter in method.start["backbone"].named_parameters():
            parameter.copy_(parameters[f"backbone.{name}"])
    for anchor, anchor_source in config.method.anchors.items():
        weights, notes = _anchored(method, anchor, anchor_source, config.init_from, shapes_only=False)
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
        origin = find(anchor_source) if anchor_source else "the weights this run starts with"
        lines += [f"network {anchor} of the method: frozen at {origin}", *notes]
        if record and anchor_source:
            facts[anchor] = find(anchor_source).record()
    return Start(facts, tuple(lines)) if lines else None


def student_tower(method: Method) -> tuple[str, VisionTower]:
    """Name and module of the backbone that a method trains; ``backbone`` if it trains several.

    Raises:
        ConfigError: it has none, or several of other names.
    """
    towers = {
        name: module
        for name, module in method.named_modules()
        if isinstance(module, VisionTower) and (name == "backbone" or any(p.requires_grad for p in module.parameters()))
    }
    name = "backbone" if "backbone" in towers else next(iter(towers), "")
    if not towers or (len(towers) > 1 and name != "backbone"):
        raise ConfigError(
            f"the method trains {len(towers)} vision towers ({', '.join(towers)})",
            where="init_from.source",
            hint="Set it to null",
        )
    return name, towers[name]


def _grid(source: Source, tower: VisionTower) -> tuple[int, int] | None:
    """Rows and columns of a source's positions, by the size of its images, where it or the settings beside it name one.

    Raises:
        CheckpointError: they name what is no size.
    """
    size: Size | None = None
    if source.saved is not None:
        method = source.saved.manifest.get("config", {}).get("method")
        views = method.get("views") if isinstance(method, dict) else None
        named = views.get("global_size") if isinstance(views, dict) else None
        size = size_of(named, where=str(source.saved.path)) if named is not None else None
    elif source.path is not None and source.kind == "folder":
        size = sizes_of(source.path).positions
    elif source.path is not None and source.path.name in FILES:
        size = sizes_of(source.path.parent).positions
    return grid_of(size, tower.patch) if size is not None else None


def _matched(method: Method, source: Source, settings: InitSettings, *, shapes_only: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under the method's names, and notes."""
    name, tower = student_tower(method)
    if settings.heads and source.saved is None:
        raise CheckpointError(
            "only checkpoints of fovea contain heads", where=f"init_from.source={source.name}", hint="Set init_from.heads=false"
        )
    state, rest, notes = _read(source, settings.network, shapes_only)
    fitted = fit(
        state, tower, where=f"init_from.source={source.name}", input_channels=settings.input_channels, grid=_grid(source, tower)
    )
    weights = {f"{name}.{inner}": tensor for inner, tensor in fitted.weights.items()}
    if settings.heads:
        new = (f"{name}.", _PROBES)
        own = {n: tuple(p.shape) for n, p in method.named_parameters() if p.requires_grad and not n.startswith(new)}
        rest = {n: t for n, t in rest.items() if not n.startswith(_PROBES)}
        compare(own, {n: tuple(t.shape) for n, t in rest.items()}, where=f"init_from.source={source.name}, heads")
        weights |= rest
    return weights, [*notes, *fitted.notes]


def _anchored(
    method: Method, name: str, anchor_source: str | None, settings: InitSettings, *, shapes_only: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a frozen network under the method's names, and notes; the current teacher's if no source is given."""
    networks = dict(method.get_submodule(name).named_children())
    if anchor_source is None and method.teacher is not None:
        taught = {n: t for n, t in method.teacher.named_parameters() if n.split(".")[0] in networks}
        return {f"{name}.{n}": tensor for n, tensor in taught.items()}, []
    source = find(anchor_source or "")
    state, rest, notes = _read(source, "teacher", shapes_only)
    where = f"network {name} of the method: {source}"
    tower = networks.pop("backbone")
    if not isinstance(tower, VisionTower):
        raise ConfigError(f"the network {name} has no vision tower", where=where, hint="Set init_from.source=null")
    fitted = fit(state, tower, where=where, input_channels=settings.input_channels, grid=_grid(source, tower))
    own = {f"{head}.{n}": tuple(p.shape) for head, module in networks.items() for n, p in module.named_parameters()}
    rest = {n: tensor for n, tensor in rest.items() if n.split(".")[0] in networks}
    compare(own, {n: tuple(t.shape) for n, t in rest.items()}, where=where)
    weights = {f"backbone.{n}": tensor for n, tensor in fitted.weights.items()} | rest
    return {f"{name}.{n}": tensor for n, tensor in weights.items()}, [*notes, *fitted.notes]


def _read(source: Source, network: str, shapes_only: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The backbone's tensors, all others, and notes."""
    if source.saved is not None:
        return (*_split(_ours(source.saved, network, shapes_only), source), [])
    state, notes = unwrapped(weights_of(source, shapes_only=shapes_only))
    return state, {}, notes


def _split(state: dict[str, Tensor], source: Source) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a fovea checkpoint's tensors into the backbone's, without its prefix, and all others."""
    names = sorted({name.split(".vit.")[0] for name in state if ".vit." in name})
    tower = "backbone" if "backbone" in names else names[0] if len(names) == 1 else None
    if tower is None:
        raise CheckpointError(
            f"the checkpoint contains {len(names)} vision towers", where=f"init_from.source={source.name}", hint="Name another"
        )
    inside = {name.removeprefix(f"{tower}."): tensor for name, tensor in state.items() if name.startswith(f"{tower}.")}
    trained = source.saved.manifest.get("shapes", {}) if source.saved is not None else {}
    return inside, {name: t for name, t in state.items() if not name.startswith(f"{tower}.") and name in trained}


def _ours(saved: Saved, network: str, shapes_only: bool) -> dict[str, Tensor]:
    read = read_teacher if network == "teacher" else read_student
    state = _shapes(saved, network) if shapes_only else dict(read(saved))
    state = merged_state(state, lora_scale(saved))
    if not state:
        raise CheckpointError(
            f"the checkpoint contains no {network}", where=str(saved.path), hint="Set init_from.network=student, or name another"
        )
    return state


def lora_scale(saved: Saved) -> float:
    """The factor of the adapters of the run that wrote a checkpoint.

    Raises:
        CheckpointError: its settings of adapters are invalid.
    """
    about = saved.manifest.get("config", {}).get("adapt")
    try:
        settings = AdaptSettings.model_validate(about if isinstance(about, dict) else {})
    except ValidationError as error:
        raise CheckpointError(
            f"its settings of adapters are invalid ({error.error_count()} problems)",
            where=str(saved.path),
            hint="Use the version of fovea that wrote it",
        ) from None
    return settings.lora.alpha / settings.lora.rank


def _shapes(saved: Saved, network: str) -> dict[str, Tensor]:
    """Tensors without values for everything that :func:`_ours` would read."""
    kinds = ("teacher/",) if network == "teacher" else ("master/", "frozen/")
    shapes: dict[str, list[int]] = {}
    for path in sorted(saved.path.glob("*.safetensors")):
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, _, name = key.partition("/")
                if f"{kind}/" in kinds:
                    shapes[name] = saved.manifest.get("shapes", {}).get(name) or file.get_slice(key).get_shape()
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def weights_of(source: Source, *, shapes_only: bool = False) -> Mapping[str, Any]:
    """The tensors of a file, a folder or a timm model, under their original names.

    Args:
        source: where they are.
        shapes_only: tensors on the ``meta`` device suffice.

    Raises:
        CheckpointError: they cannot be read or downloaded.
    """
    if source.kind == "timm":
        return _of_timm(source)
    path = source.path or Path(source.name)
    return tensors_of(path, shapes_only=shapes_only) if path.is_dir() else read_tensors(path, shapes_only=shapes_only)


def _of_timm(source: Source) -> dict[str, Tensor]:
    import timm

    name = source.name.removeprefix("timm:")
    if not timm.is_model(name) or not timm.is_model_pretrained(name):
        raise CheckpointError(
            f"timm has no weights for {name!r}",
            where=f"init_from.source={source.name}",
            hint="See timm.list_models(pretrained=True), or give a file",
        )
    try:
        # Created with its classifier, which is dropped afterwards: without classes, timm accepts files that lack tensors.
        with only_weights():
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # from timm, the hub's client, the network, or a damaged file
        raise CheckpointError(
            f"timm cannot fetch the weights of {name!r}, or they are incomplete ({reason(error)})",
            where=f"init_from.source={source.name}",
            hint="Download them on a machine with a network connection and give the file's path, "
            "or set HF_HOME to a folder that contains them",
        ) from None
    model.reset_classifier(0)
    state: dict[str, Tensor] = model.state_dict()
    return state
