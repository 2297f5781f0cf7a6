"""Loads the configuration from YAML files and command line overrides, strictly validated.

A config file is a mapping of the sections of :class:`pipeline.config.schema.Config`. ``base:`` names one or several other files,
relative to this one, that are merged first, in order: mappings key by key, everything else as a whole. Dotted overrides
(``schedule.lr.peak=1e-3``) come last. :mod:`pipeline.config.layers` parses the files.

All errors of a file are reported at once, each with its location, the key's full path, the value, what is allowed, and the
nearest valid name. This module does not import torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline.config.layers import Branch, Leaf, Problem, display, grown, merge, origin_of, override, read, scalar, unwrap
from pipeline.config.paths import same
from pipeline.config.schema import METHODS, Config
from pipeline.config.types import Length, Settings, absolute_paths, path_marker
from pipeline.config.upgrade import is_old, upgrade
from pipeline.config.validate import check
from pipeline.errors import ConfigError
from pipeline.masking import masked
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.methods.settings import MethodSettings
from pipeline.untrusted import printable

DEFAULT = "default"
_PROBLEMS = 100  # maximum number of errors reported at once
# Names that other projects use for a setting, or where they put it.
_ELSEWHERE = {
    "lr": "schedule.lr.peak",
    "learning_rate": "schedule.lr.peak",
    "lr_rule": "optim.lr_scaling",
    "batch_size": "train.global_batch_size",
    "epochs": "train.duration",
    "max_steps": "train.duration",
    "output_dir": "run.directory",
    "workers": "data.num_workers",
    "gpus": "launch.num_processes",
    "image_size": "method.views.global_size",
    "crop_scale": "method.views.global_scale",
}
_LONGEST_KEY = 200  # length of a key up to which a similar one is searched


class InvalidConfig(ConfigError):
    """A configuration that was rejected, with all its errors."""

    def __init__(self, problems: Sequence[Problem], *, hint: str = "") -> None:
        self.problems = tuple(problems)
        if len(problems) == 1:
            super().__init__(problems[0].message, where=problems[0].origin, hint=hint)
        else:
            lines = "".join(f"\n  {problem}" for problem in problems)
            super().__init__(f"{len(problems)} problems in the configuration:{lines}", hint=f"\n{hint}" if hint else "")


@dataclass(frozen=True)
class Loaded:
    """A validated configuration with the origin of each value.

    Attributes:
        config: the settings.
        provenance: for each dotted key ``file:line:column``, ``command line``, or ``default``.
        typed: paths as the user wrote them, by dotted key; in ``config`` they are absolute.
        source: the file that was requested.
    """

    config: Config
    provenance: Mapping[str, str]
    source: Path
    typed: Mapping[str, Any] = field(default_factory=dict)

    def nobodys_choice(self, key: str) -> str:
        """Returns the origin of a value that the user set neither on the command line nor in their own file; empty if they did.

        Such a value comes from a config shipped with fovea, or from the settings stored in a run.
        """
        origin = self.provenance.get(key, DEFAULT)
        file_position = re.fullmatch(r"(.*):\d+:\d+", origin)
        if file_position is None:
            return ""
        file = Path(file_position[1]).resolve()
        kept = file == self.source.resolve() and stored_run(file) is not None
        return origin if kept or any(file.is_relative_to(root.resolve()) for root in roots()) else ""


def roots() -> list[Path]:
    """Returns the directories in which configs are looked up by name: the checkout's ``configs``, then the installed ones."""
    folders = [Path(__file__).resolve().parents[2] / "configs", Path(sys.prefix) / "share" / "fovea" / "configs"]
    return [folder for folder in folders if folder.is_dir()]


def available() -> dict[str, Path]:
    """Lists names and files of the configs shipped with fovea.

    Those under ``base`` or starting with ``_`` only serve as bases and are omitted.
    """
    configs: dict[str, Path] = {}
    for root in roots():
        for file in sorted(root.rglob("*.yaml")):
            name = file.relative_to(root).with_suffix("").as_posix()
            if not re.search(r"(^|/)(_|base)|^clusters/", name):
                configs.setdefault(name, file)
    return configs


def headline(file: Path) -> str:
    """Returns the first line of a config's header comment."""
    with file.open(encoding="utf-8") as lines:
        return next(lines, "").lstrip("# ").strip()


def resolve(name: str | Path) -> Path:
    """Returns the file of a config given as a path, by name (``dinov2/cifar10_vit_tiny``), or as a run directory.

    Raises:
        ConfigError: there is no such file; the message lists the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    if (path / "config.yaml").is_file():  # a run directory
        return path / "config.yaml"
    known = available()
    bare = path.with_suffix("").as_posix().removeprefix("./").removeprefix("configs/")
    if bare in known:
        return known[bare]
    near = difflib.get_close_matches(bare, known, 3, 0.4) or list(known)
    raise ConfigError(
        f"there is no config {str(name)!r}",
        hint=f"Give a YAML file's path, or a name: {', '.join(near)}. `fovea config show` lists them all",
    )


def stored_run(file: Path) -> Path | None:
    """Returns the run whose stored settings a file holds; ``None`` for configs that users write."""
    return file.parent if file.name == "config.yaml" and (file.parent / "config.json").is_file() else None


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Reads a config with its bases, applies overrides, and validates everything.

    A run's stored settings refer to the run directory they are found in, which may have been moved.

    Args:
        path: a file, or the name of a config shipped with fovea.
        overrides: ``key.path=value`` strings; the value is parsed as a YAML scalar, list or mapping.

    Raises:
        InvalidConfig: with every error found.
        ConfigError: no such file, or invalid YAML.
    """
    file = resolve(path)
    problems: list[Problem] = []
    tree = read(file, problems, ())
    if (found_in := stored_run(file)) is not None:
        if is_old(tree.children):
            tree = grown(upgrade(unwrap(tree)), display(file))
        merge(tree, Branch({"run": Branch({"directory": Leaf(os.path.abspath(found_in), display(file))}, display(file))}, ""))
    for text in overrides:
        merge(tree, override(text, problems))
    run = tree.children.setdefault("run", Branch({}, "the file's name"))
    if isinstance(run, Branch) and "name" not in run.children:
        run.children["name"] = Leaf(re.sub(r"[^\w.+-]", "-", file.stem).lstrip("_.+-") or "run", "the file's name")
    config, invalid = _validate(tree, display(file))
    problems += invalid
    if config is None or problems:
        raise InvalidConfig(problems)
    if config.run.directory is None:
        config = config.replace(run=config.run.model_copy(update={"directory": config.run.folder}))
    typed, config = flatten(config), absolute_paths(config)
    origins = {key: origin for key in flatten(config) if (origin := origin_of(tree, key.split(".")))}
    provenance = {key: origins.get(key, DEFAULT) for key in flatten(config)}
    if broken := check(config):
        raise InvalidConfig([Problem(key, message, provenance.get(key, display(file))) for key, message in broken])
    return Loaded(config, provenance, file, {key: typed[key] for key, value in flatten(config).items() if typed[key] != value})


# ---- a tree to settings -------------------------------------------------------------------------------------------------


def problems_of(tree: Branch, shown: str) -> list[Problem]:
    """The errors of single keys in a tree of settings."""
    return _validate(tree, shown)[1]


def _validate(tree: Branch, shown: str) -> tuple[Config | None, list[Problem]]:
    """Validates a tree; returns the settings, or the errors of single keys."""
    problems: list[Problem] = []
    raw = unwrap(tree)
    section, method = raw.pop("method", {}), str(Dinov2Settings().name)
    name: Any = section.get("name", method) if isinstance(section, dict) else method
    if isinstance(name, str) and name in METHODS:
        method = name
    else:
        near = difflib.get_close_matches(str(name), METHODS, 1)
        suggestion = f"; did you mean {near[0]}?" if near else ""
        message = f"method.name = {_quote(name)}: no such method{suggestion} (allowed: {', '.join(sorted(METHODS))})"
        problems.append(Problem("method.name", message, origin_of(tree, ["method", "name"]) or shown))
        section = {}
    fields = schema(method)
    parts: dict[str, Any] = {}
    for prefix, kind, value in (("", Config, raw), ("method", METHODS[method], section)):
        try:
            parts[prefix] = kind.model_validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_context=False)[:_PROBLEMS]:
                problems.append(_problem(detail, [prefix] if prefix else [], fields, tree, shown))
    if problems:
        order = {problem: _position(problem.origin) for problem in problems}
        return None, sorted(problems, key=lambda problem: order[problem])
    return parts[""].replace(method=parts["method"]), []


def _position(origin: str) -> tuple[str, int, int]:
    match = re.fullmatch(r"(.*):(\d+):(\d+)", origin)
    return (match[1], int(match[2]), int(match[3])) if match else (origin, 0, 0)


def _problem(detail: Any, prefix: list[str], fields: Mapping[str, FieldInfo], tree: Branch, shown: str) -> Problem:
    location = [*prefix, *detail["loc"]]
    if detail["type"] in ("shards", "sources"):
        location.append(detail["type"])
    names = [str(part) for part in location if not isinstance(part, int)]
    index = "".join(f"[{part}]" for part in location if isinstance(part, int))
    path = ".".join(names)
    origin = origin_of(tree, names) or shown
    if detail["type"] == "extra_forbidden":
        parent = ".".join(names[:-1])
        near = nearest(path, fields)
        suggestion = f"; did you mean {near!r}?" if near else ""
        names_allowed = ", ".join(_children(parent, fields))
        message = f"unknown key {printable(path, limit=_LONGEST_KEY)!r}{suggestion} (allowed {_under(parent)}: {names_allowed})"
        return Problem(path, message, origin)
    info = fields.get(path)
    reason = detail["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("an object", "a section")
    limits = allowed(info) if info is not None else ""
    message = "" if limits in reason else f"; allowed: {limits}"
    meaning = f" ({info.description}{message})" if info is not None else ""
    if detail["type"] == "missing" and index:
        return Problem(path, f"{path} has too few values{meaning}", origin)
    if detail["type"] == "missing":
        return Problem(path, f"{path} is required{meaning}", origin)
    if detail["type"] in ("shards", "sources"):
        return Problem(path, f"{path} {reason}{meaning}", origin)
    return Problem(path, f"{path}{index} = {_quote(detail['input'])}: {reason}{meaning}", origin)


def _under(parent: str) -> str:
    return f"under {parent}" if parent else "at the top"


def _children(parent: str, fields: Mapping[str, FieldInfo]) -> list[str]:
    start = f"{parent}." if parent else ""
    return sorted(key[len(start) :] for key in fields if key.startswith(start) and "." not in key[len(start) :])


def _quote(value: Any) -> str:
    text = "null" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    text = printable(text)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(path: str, fields: Mapping[str, Any] | None = None) -> str | None:
    """Returns the valid dotted key most similar to an unknown one: by its last part first, then by its prefix."""
    if len(path) > _LONGEST_KEY:
        return None
    parent, _, leaf = path.rpartition(".")
    if leaf in _ELSEWHERE and (fields is None or _ELSEWHERE[leaf] in fields):
        return _ELSEWHERE[leaf]
    best: tuple[float, str] | None = None
    for key in fields if fields is not None else schema():
        above, _, name = key.rpartition(".")
        own = difflib.SequenceMatcher(None, leaf, name).ratio()
        if own >= 0.6:
            score = own + 0.5 * difflib.SequenceMatcher(None, parent, above).ratio()
            best = max(best, (score, key)) if best else (score, key)
    return best[1] if best else None


@cache
def schema(method: str = "dinov2") -> dict[str, FieldInfo]:
    """Returns every section and setting by dotted key, for the given method."""

    def walk(kind: type[Settings], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, info in kind.model_fields.items():
            yield prefix + name, info
            inner = METHODS[method] if info.annotation is MethodSettings or name == "method" else info.annotation
            for part in (
                inner,
                *typing.get_args(inner),
            ):  # descend into lists and optional sections: an unknown key is reported with the valid ones, marks are found
                inner = typing.get_args(part)[0] if typing.get_origin(part) is tuple else inner
                inner = part if isinstance(part, type) and issubclass(part, Settings) else inner
            if isinstance(inner, type) and issubclass(inner, Settings):
                yield from walk(inner, f"{prefix}{name}.")

    return dict(walk(Config, ""))


def allowed(info: FieldInfo) -> str:
    """Describes the values that a setting allows."""
    return _describe(info.annotation, list(info.metadata))


def _describe(kind: Any, limits: list[Any]) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    bounds = "".join(
        f" {sign} {getattr(limit, name):g}"
        for limit in limits
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(limit, name, None) is not None
    ).replace(" <", " and <")
    if origin is typing.Annotated:
        inner = [part for extra in arguments[1:] for part in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return _describe(arguments[0], [*inner, *limits])
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _describe(part, limits) for part in arguments)
    if origin is typing.Literal:
        return ", ".join(str(choice) for choice in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        one = _describe(arguments[0], [])
        return f"{one}, or a list of such" if arguments[0] is str else f"list of {one}"
    if origin is tuple:
        return "[" + ", ".join(_describe(part, []) for part in arguments) + "]"
    if kind is Length:
        return Length.SYNTAX
    if isinstance(kind, type) and issubclass(kind, Settings):
        return "a section with " + ", ".join(kind.model_fields)
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    pattern = next((f" matching {limit.pattern}" for limit in limits if getattr(limit, "pattern", None)), "")
    return plain.get(kind, getattr(kind, "__name__", str(kind))) + bounds + pattern


# ---- settings to text ---------------------------------------------------------------------------------------------------


def flatten(config: Settings, prefix: str = "") -> dict[str, Any]:
    """Returns all settings by dotted key, as JSON values."""
    plain = config.model_dump(mode="json")
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Settings) else {prefix + name: plain[name]}
    return flat


def identity(config: Config) -> dict[str, Any]:
    """Returns the settings that determine what a run computes: :func:`flatten` without run.name and runtime settings.

    The samples in the shards are not included: the index's fingerprint covers them, wherever the shards are stored.
    """
    fields = schema(config.method.name)
    runtime = {
        key for key, info in fields.items() if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("runtime")
    }
    prefixes = tuple(f"{key}." for key in runtime)
    flat = masked(flatten(config))  # a renewed signature does not change the link
    return {key: value for key, value in flat.items() if key not in runtime | {"run.name"} and not key.startswith(prefixes)}


def fingerprint(config: Config) -> str:
    """Returns the SHA-256 (hex) of the canonical JSON of :func:`identity`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(old: Config, new: Config, *, runtime: bool = False) -> dict[str, tuple[Any, Any]]:
    """Returns changed settings by dotted key as (old, new), ``None`` for a missing key.

    Args:
        old: settings before.
        new: settings after.
        runtime: include runtime settings.
    """
    first, second = (flatten(old), flatten(new)) if runtime else (identity(old), identity(new))
    keys = [*first, *(key for key in second if key not in first)]
    changed = {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}
    fields = schema(new.method.name)
    paths = {key for key in changed if key in fields and path_marker(fields[key])}
    return {key: pair for key, pair in changed.items() if key not in paths or not same(*pair)}


def show(loaded: Loaded, *, secrets: bool = False, absolute: bool = False) -> str:
    """Returns the effective configuration as YAML that can be loaded again, with the origin of each value in a comment.

    Args:
        loaded: the configuration.
        secrets: keep the queries of signed links, for a file that only the user can read; otherwise they are masked.
        absolute: write absolute paths instead of the paths as typed.
    """
    lines: list[tuple[str, str]] = []
    section: list[str] = []
    flat = {**flatten(loaded.config), **({} if absolute else loaded.typed)}
    derived = str(loaded.config.run.model_copy(update={"directory": None}).folder)
    if not absolute and loaded.provenance.get("run.directory", DEFAULT) == DEFAULT and flat["run.directory"] == derived:
        flat["run.directory"] = None  # follows run.name, which a copy of this file may change
    for key, value in (flat if secrets else masked(flat)).items():
        *above, name = key.split(".")
        kept = next((i for i, (a, b) in enumerate(zip(section, above, strict=False)) if a != b), min(len(section), len(above)))
        lines += [(f"{'  ' * depth}{above[depth]}:", "") for depth in range(kept, len(above))]
        section = above
        lines.append((f"{'  ' * len(above)}{name}: {_dump(value)}", loaded.provenance.get(key, DEFAULT)))
    width = min(max(len(text) for text, origin in lines if origin), 60)
    head = f"# {display(loaded.source)}, fingerprint {fingerprint(loaded.config)[:12]}\n"
    return head + "".join(f"{text:<{width}}  # {_comment(origin)}\n" if origin else f"{text}\n" for text, origin in lines)


def _comment(origin: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in origin)


def _dump(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_dump(inner)}" for key, inner in value.items()) + "}"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z/][\w./+-]*( [a-z]+)?", value, re.ASCII) and scalar(value) is value:
        return value
    if re.fullmatch(r"[0-9.]+ [a-z]+", value):
        return value
    marks = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(marks.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in value) + '"'
