"""Parses YAML files and overrides and merges them to one tree that records the origin of every value.

Plain scalars follow the YAML 1.2 core schema: ``1e-3`` is a number, ``12:30:00``, ``on`` and ``yes`` are strings, ``010`` is ten.
Keys are strings. Duplicate keys are rejected. ``base:`` names the files that this one extends.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.untrusted import printable, read_bytes

COMMAND_LINE = "command line"
_BYTES = 4 << 20  # maximum size of one file
_FILES = 200  # maximum number of files read for one config, bases included
_UNDER_WAY = -1
_NODES = 50_000  # maximum number of values in one file, aliases expanded
_SIMPLIFY = "Remove levels, lists or aliases"
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_DIGITS = 400  # of a number; longer ones are strings
_KEYWORDS: dict[str, Any] = {"": None, "~": None, "true": True, "false": False} | {
    form: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for form in (word, word.capitalize(), word.upper())
}


@dataclass(frozen=True)
class Problem:
    """One error in a configuration.

    Attributes:
        path: dotted key; empty if the error concerns the whole file.
        message: what is wrong and what is allowed, starting with the key.
        origin: ``file:line:column``, ``command line`` or ``default``.
    """

    path: str
    message: str
    origin: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}" if self.origin else self.message


@dataclass
class Leaf:
    """A value that is not a mapping, with its origin."""

    value: Any
    origin: str


@dataclass
class Branch:
    """A mapping, with its origin."""

    children: dict[str, Leaf | Branch]
    origin: str


def grown(document: dict[str, Any], origin: str) -> Branch:
    """Builds a tree from plain values, all with the same origin."""
    return Branch(
        {key: grown(value, origin) if isinstance(value, dict) else Leaf(value, origin) for key, value in document.items()}, origin
    )


def scalar(text: str) -> Any:
    """Parses a plain YAML 1.2 scalar: null, a boolean, an integer, a float, or the string itself."""
    if text in _KEYWORDS:
        return _KEYWORDS[text]
    if _INTEGER.fullmatch(text) and len(text) <= _DIGITS:
        return int(text)
    if _FLOAT.fullmatch(text) and len(text) <= _DIGITS:
        return float(text)
    return text


def display(file: Path) -> str:
    """Returns a file's path for display: relative if it is below the working directory."""
    relative = os.path.relpath(file)
    return str(file.resolve()) if relative.startswith("..") else relative


def read(file: Path, problems: list[Problem], above: tuple[Path, ...], seen: list[Path] | None = None) -> Branch:
    """Reads a file and merges it onto its bases.

    Args:
        file: the YAML file.
        problems: receives the errors of single keys.
        above: the files that extend this one.
        seen: receives every file that is read, once for each time it is used as a base.

    Raises:
        ConfigError: the file cannot be read, is not a YAML mapping, is too large, or is its own base; or there are too many
            files.
    """
    seen = [] if seen is None else seen
    seen.append(file)
    if len(seen) > _FILES:
        raise ConfigError(f"has more than {_FILES} base files", where=display(seen[0]), hint="Name each base once")
    shown = display(file)
    if file.resolve() in above:
        raise ConfigError("the file is its own base", where=shown, hint="Remove the `base:` line that closes the circle")
    try:
        node = compose(read_bytes(file, limit=_BYTES, error=ConfigError).decode("utf-8"), shown)
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=shown, hint="Check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", where=shown, hint="Save the file in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f"{shown}:{mark.line + 1}:{mark.column + 1}" if mark else shown
        raise ConfigError(
            f"is not valid YAML: {getattr(error, 'problem', None) or error}", where=position, hint="Correct the syntax there"
        ) from error
    own = _grow(node, shown, problems) if node is not None else Branch({}, shown)
    if not isinstance(own, Branch):
        raise ConfigError("must be a mapping of sections", where=shown, hint="See `fovea config show` for an example")
    base = own.children.pop("base", None)
    merged = Branch({}, shown)
    if base is not None:
        value = base.value if isinstance(base, Leaf) else None
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError("`base` must be a file or a list of files", where=base.origin, hint="Write base: other.yaml")
        for name in names:
            if printable(name) != name:
                raise ConfigError(
                    f"base {printable(name)!r} contains control characters", where=base.origin, hint="Write base: other.yaml"
                )
            parent = file.parent / name
            if not _is_file(parent):
                raise ConfigError(
                    f"base {name!r} does not exist",
                    where=base.origin,
                    hint=f"Check the path {display(parent)}. "
                    "A config of fovea's own becomes a file with `fovea config show NAME > my.yaml`",
                )
            merge(merged, read(parent, problems, (*above, file.resolve()), seen))
    merge(merged, own)
    return merged


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def compose(text: str, where: str) -> yaml.Node | None:
    """Parses a YAML document to nodes, without constructing objects; ``None`` if it is empty.

    Raises:
        ConfigError: nested too deeply, more than 50000 values with aliases expanded, or an invalid escape.
        yaml.YAMLError: invalid YAML.
    """
    try:
        node = _compose(text, where)
        weight = _weight(node, {}, where) if node is not None else 0
    except RecursionError:
        raise ConfigError("is nested too deeply", where=where, hint=_SIMPLIFY) from None
    except (ValueError, OverflowError) as error:  # an escape that is not a character
        raise ConfigError(
            f"is not valid YAML ({printable(str(error), limit=80)})", where=where, hint="Correct the escape in the quoted string"
        ) from None
    if weight > _NODES:
        raise ConfigError(f"must not have more than {_NODES} values, with aliases expanded", where=where, hint=_SIMPLIFY)
    return node


def _compose(text: str, where: str) -> yaml.Node | None:
    """``yaml.compose`` with a limit of 50000 nodes: PyYAML takes minutes and gigabytes for a file of 4 MiB."""
    count = 0

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            nonlocal count
            count += 1
            if count > _NODES:
                raise ConfigError(f"must not have more than {_NODES} values", where=where, hint=_SIMPLIFY)
            node: yaml.Node | None = super().compose_node(parent, index)
            return node

    composed: yaml.Node | None = yaml.compose(text, Loader=Loader)
    return composed


def _weight(node: yaml.Node, known: dict[int, int], where: str) -> int:
    """Counts the values of a node, itself included, with aliases expanded."""
    if known.get(id(node)) == _UNDER_WAY:
        raise ConfigError(
            "is nested too deeply: an alias refers to a node that contains it", where=where, hint="Remove the alias"
        )
    if id(node) not in known:
        known[id(node)] = _UNDER_WAY
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = list(node.value)
        known[id(node)] = 1 + sum(_weight(part, known, where) for part in inner)
    return known[id(node)]


def _grow(node: yaml.Node, shown: str, problems: list[Problem], path: str = "", depth: int = 0) -> Leaf | Branch:
    origin = f"{shown}:{node.start_mark.line + 1}:{node.start_mark.column + 1}" if shown != COMMAND_LINE else shown
    if depth > 20:
        raise ConfigError(f"{path or 'the file'} is nested too deeply", where=origin, hint=_SIMPLIFY)
    if not isinstance(node, yaml.MappingNode):
        return Leaf(_plain(node), origin)
    children: dict[str, Leaf | Branch] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else str(_plain(key))
        full = f"{path}.{name}" if path else name
        position = f"{shown}:{key.start_mark.line + 1}:{key.start_mark.column + 1}" if shown != COMMAND_LINE else shown
        if name in children:
            problems.append(Problem(full, f"{full} is given twice; the first time at {children[name].origin}", position))
        child = _grow(value, shown, problems, full, depth + 1)
        child.origin = position
        children[name] = child
    return Branch(children, origin)


def _plain(node: yaml.Node, depth: int = 0) -> Any:
    if depth > 20:
        raise ConfigError("a list is nested too deeply", hint=_SIMPLIFY)
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None and node.tag != "!" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, depth + 1) for item in node.value]
    return {str(_plain(key, depth + 1)): _plain(value, depth + 1) for key, value in node.value}


def override(text: str, problems: list[Problem]) -> Branch:
    """Parses one ``key.path=value`` of the command line to a tree; errors go to ``problems``."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        problems.append(Problem("", f"{text!r} must be key.path=value, for instance schedule.lr.peak=1e-3", COMMAND_LINE))
        return Branch({}, COMMAND_LINE)
    value = value.strip()
    end: Leaf | Branch = Leaf(scalar(value), COMMAND_LINE)
    if value[:1] in ("[", "{", '"', "'"):
        try:
            node = compose(value, COMMAND_LINE)
            end = _grow(node, COMMAND_LINE, problems) if node is not None else end
        except yaml.YAMLError:
            pass  # a path may begin with a brace: keep it as a string
    for part in reversed(parts):
        end = Branch({part: end}, COMMAND_LINE)
    return end if isinstance(end, Branch) else Branch({}, COMMAND_LINE)


def merge(onto: Branch, update: Branch, *, top: bool = True) -> None:
    """Merges ``update`` into ``onto``, in place: mappings key by key, everything else as a whole.

    A section that selects another method or optimizer replaces the old one, since its keys have other meanings.
    """
    for name, child in update.children.items():
        old = onto.children.get(name)
        if isinstance(old, Branch) and isinstance(child, Branch) and not (top and _exchanged(name, old, child)):
            merge(old, child, top=False)
        else:
            onto.children[name] = child


def _exchanged(section: str, old: Branch, new: Branch) -> bool:
    if section not in ("method", "optim"):
        return False
    return _name_of(new) not in (None, _name_of(old) or Config.model_fields[section].default.name)


def _name_of(branch: Branch) -> Any:
    leaf = branch.children.get("name")
    return leaf.value if isinstance(leaf, Leaf) else None


def origin_of(tree: Branch, path: Sequence[str]) -> str:
    """Returns the origin of a key's value, or of the mapping or list that contains it; empty if there is none."""
    node: Leaf | Branch = tree
    for part in path:
        if isinstance(node, Leaf):
            break
        if part not in node.children:
            return ""
        node = node.children[part]
    return node.origin


def unwrap(node: Leaf | Branch) -> Any:
    """Converts a tree to plain values."""
    return node.value if isinstance(node, Leaf) else {name: unwrap(child) for name, child in node.children.items()}
