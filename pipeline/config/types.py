"""Types of settings: durations, ranges, strings, paths, and the strict base class of every section."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from pipeline.config.paths import Kind, absolute, patterns
from pipeline.config.sizes import Size
from pipeline.untrusted import plain_value, printable

# A field marked so changes neither the samples nor the computation of a run: a resume may change it.
RUNTIME: dict[str, Any] = {"runtime": True}


_MIN_SIDE, _MAX_SIDE = 8, 4096


def _size(value: object) -> object:
    sides = value if isinstance(value, list | tuple) else (value,)
    valid = all(type(side) is int and _MIN_SIDE <= side <= _MAX_SIDE for side in sides)
    if not valid or len(sides) != (2 if isinstance(value, list | tuple) else 1):
        raise PydanticCustomError(
            "size",
            "must be a side, or [height, width], each a whole number of pixels from {low} to {high}",
            {"low": _MIN_SIDE, "high": _MAX_SIDE},
        )
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


ImageSize = Annotated[Size, BeforeValidator(_size)]
"""A size of images; two equal sides become one number, so that they are the same settings."""


@dataclass(frozen=True)
class Length:
    """A duration of training: a number of samples, of optimizer steps, or of epochs.

    In a config: ``1500000``, ``1.5M samples``, ``500 steps`` or ``3 epochs``. ``k``, ``M`` and ``G`` are 1e3, 1e6 and 1e9.
    """

    amount: float
    unit: Literal["samples", "steps", "epochs"] = "samples"

    SYNTAX = "a number of samples, or text such as '3 epochs', '500 steps', '1.5M samples'"

    @classmethod
    def parse(cls, value: object) -> Length:
        """Parses a duration as written in a config.

        Raises:
            ValueError: not a duration, negative, or a fraction of a sample or of a step.
        """
        if isinstance(value, Length):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"must be {cls.SYNTAX}")
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kMG]?)\s*(samples?|steps?|epochs?)?\s*", str(value))
        try:
            amount = float(match[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]] if match else -1.0
        except ValueError:
            amount = -1.0
        if match is None or not 0 <= amount < 1e18:
            raise ValueError(f"must be {cls.SYNTAX}")
        unit = ((match[3] or "samples").rstrip("s") + "s").strip()
        if unit != "epochs" and abs(amount - round(amount)) > 1e-6:
            raise ValueError(f"must be a whole number of {unit}")
        return cls(amount if unit == "epochs" else float(round(amount)), unit)  # type: ignore[arg-type]

    def samples(self, epoch_samples: int, global_batch: int) -> int:
        """Returns the duration in samples, rounded to the nearest.

        Args:
            epoch_samples: samples per epoch.
            global_batch: samples of one optimizer step over all ranks.
        """
        return round(self.amount * {"samples": 1, "steps": global_batch, "epochs": epoch_samples}[self.unit])

    def steps(self, epoch_samples: int, global_batch: int) -> int:
        """Returns the smallest number of optimizer steps that covers the duration."""
        return -(-self.samples(epoch_samples, global_batch) // global_batch)

    def __str__(self) -> str:
        number = repr(self.amount).removesuffix(".0") if self.amount < 1e15 else str(int(self.amount))
        return number if self.unit == "samples" else f"{number} {self.unit}"

    def plain(self) -> int | str:
        """Returns the form used in a config: an integer for samples, a string otherwise."""
        return int(self.amount) if self.unit == "samples" else str(self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(cls.plain)
        )


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"must be [minimum, maximum], but {pair[0]} is above {pair[1]}")
    return pair


def _values(values: Any) -> Any:
    if not isinstance(values, list | tuple):
        return values
    texts = [plain_value(value) for value in values]
    if None in texts:
        raise ValueError(f"holds {values[texts.index(None)]!r}; give strings, whole numbers, true or false")
    if len(set(texts)) < len(texts):
        raise ValueError("names a value twice (3 and '3' are the same)")
    return tuple(texts)


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _files(value: object) -> object:
    return (value,) if isinstance(value, str | Path) else tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Rejects control characters, which would end up in scripts and terminals."""
    for text in value if isinstance(value, tuple) else (value,):
        if printable(str(text)) != str(text):
            raise ValueError("must not contain line breaks or other control characters")
    return value


@dataclass(frozen=True)
class PathLike:
    """Marks a setting that names files; it is relative to the directory in which it was typed.

    Attributes:
        kind: see :func:`pipeline.config.paths.absolute`.
        keywords: values that are not paths.
    """

    kind: Kind
    keywords: frozenset[str] = frozenset()

    def absolute(self, value: Any, folder: str | None = None) -> Any:
        """Returns the value with paths that are valid in every working directory."""
        if value is None:
            return None
        if isinstance(value, tuple) and self.kind == "patterns":
            return patterns(value, folder)
        if isinstance(value, tuple):
            return tuple(self.absolute(one, folder) for one in value)
        return type(value)(absolute(str(value), self.kind, folder, keywords=self.keywords))


Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(_ordered)]
Values = Annotated[tuple[str, ...], BeforeValidator(_values)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
# Settings that name files have these types; tests/config/test_paths.py rejects any other string setting that does.
FilePath = Annotated[Path, AfterValidator(_plain), PathLike("path")]
PathName = Annotated[str, AfterValidator(_plain), PathLike("name")]
ResumePath = Annotated[str, AfterValidator(_plain), PathLike("name", frozenset(("auto", "never")))]
TrackingUri = Annotated[str, AfterValidator(_plain), PathLike("uri")]
SelectionFiles = Annotated[tuple[FilePath, ...], BeforeValidator(_files)]
Shards = Annotated[tuple[str, ...], BeforeValidator(_texts), AfterValidator(_plain), PathLike("patterns")]


class Settings(BaseModel):
    """Base class of all sections: frozen, rejects unknown keys and infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Returns a copy with some values replaced. The names are checked, the values are not.

        Raises:
            TypeError: there is no such setting.
        """
        if unknown := sorted(set(update or ()) - type(self).model_fields.keys()):
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(unknown)}")
        return super().model_copy(update=update, deep=deep)


def path_marker(info: FieldInfo) -> PathLike | None:
    """Returns how a setting names files; ``None`` if it does not."""
    return next((mark for mark in [*info.metadata, *_metadata(info.annotation)] if isinstance(mark, PathLike)), None)


def _metadata(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for part in typing.get_args(annotation):
        yield from _metadata(part)


_S = TypeVar("_S", bound="Settings")


def absolute_paths(settings: _S, folder: str | None = None) -> _S:
    """Returns a copy of a section, with all sections below it, in which every path is absolute.

    Args:
        settings: any section.
        folder: the directory its paths are relative to; by default the working directory.
    """
    changed: dict[str, Any] = {}
    for name, info in type(settings).model_fields.items():
        value, mark = getattr(settings, name), path_marker(info)
        if mark is not None:
            changed[name] = mark.absolute(value, folder)
        elif isinstance(value, Settings):
            changed[name] = absolute_paths(value, folder)
        elif isinstance(value, tuple) and any(isinstance(one, Settings) for one in value):
            changed[name] = tuple(absolute_paths(one, folder) if isinstance(one, Settings) else one for one in value)
    return settings.model_copy(update={name: value for name, value in changed.items() if value != getattr(settings, name)})


def path_values(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Returns all settings that name files and are set, by dotted key."""
    named: dict[str, Any] = {}
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if path_marker(info) is not None and value not in (None, ()):
            named[prefix + name] = value
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Settings):
                named |= path_values(one, f"{prefix}{name}.")
    return named
