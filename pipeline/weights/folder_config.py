"""Validates the architecture settings in an untrusted weights folder: allow-listed names, bounded plain values."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.untrusted import printable

_MOST = 1 << 20  # maximum of any size: a vocabulary is the largest
_MOST_LAYERS = 512
_LAYERS = ("depth", "layers", "num_hidden_layers", "attn_pooler_queries", "reg_tokens", "num_register_tokens")
_HINT = "Choose another folder: this one is damaged, or made for another program"


@dataclass(frozen=True)
class Settings:
    """Settings read from a foreign file.

    Attributes:
        values: arguments of the architecture: numbers, flags, strings or short lists of numbers.
        other: entries that this program interprets itself, unchecked.
    """

    values: dict[str, Any]
    other: dict[str, Any]


def read_settings(
    settings: Mapping[str, Any],
    takes: Callable[..., Any],
    *,
    where: str,
    never: tuple[str, ...] = (),
    other: tuple[str, ...] = (),
    ignore_unknown: bool = False,
) -> Settings:
    """Reads the settings that an architecture accepts.

    Args:
        settings: content of the foreign file.
        takes: the class or function whose parameters are allowed.
        where: the file, for messages.
        never: prefixes of names that are refused unless empty or off, because they would load from elsewhere.
        other: prefixes of names that go to ``other``.
        ignore_unknown: drop names that ``takes`` does not accept instead of refusing them.

    Raises:
        CheckpointError: a name that is not allowed, or a value that is not plain.
    """
    if dataclasses.is_dataclass(takes):
        allowed = {field.name for field in dataclasses.fields(takes)}
    else:
        allowed = set(inspect.signature(takes).parameters) - {"self", "args", "kwargs"}
    values: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in settings.items():
        if name.startswith(other) and other:
            rest[name] = value
        elif name.startswith(never) and never:
            if value:
                raise CheckpointError(
                    f"{printable(name, limit=80)} is not supported", where=where, hint="Export it to timm's layout"
                )
        elif name in allowed and not name.startswith("_"):
            values[name] = _value(name, value, where)
        elif not ignore_unknown:
            raise CheckpointError(f"the setting {printable(name, limit=80)!r} is unknown", where=where, hint=_HINT)
    return Settings(values, rest)


def _value(name: str, value: Any, where: str) -> Any:
    most = _MOST_LAYERS if name in _LAYERS else _MOST
    if (
        value is None
        or isinstance(value, bool)
        or (isinstance(value, str) and len(value) <= 64 and value.isidentifier() | (not value))
    ):
        return value
    if isinstance(value, int | float) and abs(value) <= most and math.isfinite(value):
        return value
    if isinstance(value, list) and len(value) <= 64 and all(type(v) in (int, float) and abs(v) <= most for v in value):
        return value
    if isinstance(value, dict) and name.endswith("_kwargs") and len(value) <= 8:  # arguments of a norm or an activation
        return {key: _value(key, inner, where) for key, inner in value.items() if key.isidentifier()}
    raise CheckpointError(f"{name} must be a number, a boolean or a plain string", where=where, hint=_HINT)


def side(value: Any, *, where: str) -> int:
    """The side of square images in pixels, given as a number or a pair.

    Raises:
        CheckpointError: it is not a number from 1 to 65536.
    """
    value = value[0] if isinstance(value, list | tuple) and value else value
    if type(value) is int and 0 < value <= 1 << 16:
        return value
    raise CheckpointError("the size of images must be a number from 1 to 65536", where=where, hint=_HINT)


def three(value: Any, *, where: str, positive: bool = False) -> tuple[float, float, float]:
    """One number each for red, green and blue.

    Raises:
        CheckpointError: there are not three, or one is not finite, or not above 0 where required.
    """
    if isinstance(value, list | tuple) and len(value) == 3 and all(type(v) in (int, float) and math.isfinite(v) for v in value):
        red, green, blue = map(float, value)
        if not positive or min(red, green, blue) > 0:
            return red, green, blue
    raise CheckpointError("mean and std must be three numbers", where=where, hint=_HINT)
