"""Validates the architecture settings in an untrusted weights folder: allow-listed names, bounded plain values."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.sizes import Size, size_text
from pipeline.errors import CheckpointError
from pipeline.untrusted import printable

_MOST = 1 << 20  # maximum of any size: a vocabulary is the largest
_MOST_LAYERS = 512
_MOST_PIXELS = 1 << 16  # of a side
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
    """A side in pixels, given as a number or a pair of equal ones.

    Raises:
        CheckpointError: it is not a number from 1 to 65536.
    """
    size = size_of(value, where=where)
    if isinstance(size, int):
        return size
    raise CheckpointError(f"{size_text(size)} pixels must be square", where=where, hint=_HINT)


def size_of(value: Any, *, where: str) -> Size:
    """The size of images in pixels: a side, or a pair of height and width; two equal ones are a side.

    Raises:
        CheckpointError: it is neither, or a side is not a number from 1 to 65536.
    """
    sides = value if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(type(one) is int and 0 < one <= _MOST_PIXELS for one in sides):
        raise CheckpointError(
            f"the size of images must be a number from 1 to {_MOST_PIXELS}, or two of them", where=where, hint=_HINT
        )
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def input_size(value: Any, *, where: str) -> Size:
    """The size of images in pixels, of timm's ``input_size``: channels, height and width.

    Raises:
        CheckpointError: it is not three numbers, or as for :func:`size_of`.
    """
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise CheckpointError("input_size must be channels, height and width", where=where, hint=_HINT)
    return size_of(value[1:], where=where)


@dataclass(frozen=True)
class ImageSizes:
    """Sizes of images that a folder of weights names, in pixels; ``None`` for what it does not name.

    Attributes:
        positions: of the images whose grid of patches the weights have, as trained or resampled.
        images: that images are resized to.
    """

    positions: Size | None = None
    images: Size | None = None


def image_sizes(document: Mapping[str, Any], *, where: str, pixels: Mapping[str, Any] | None = None) -> ImageSizes:
    """The sizes that the settings of a folder name: the one rule for all who read such settings.

    Args:
        document: ``open_clip_config.json``, or ``config.json`` of timm, transformers or an export of fovea.
        where: the file, for messages.
        pixels: ``preprocessor_config.json`` of transformers.

    Raises:
        CheckpointError: one is named, and is no size.
    """

    def at(*keys: str, within: Mapping[str, Any] | None = None) -> Any:
        value: Any = document if within is None else within
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def read(value: Any) -> Size | None:
        return None if value is None else size_of(value, where=where)

    if "model_cfg" in document:  # open_clip
        positions = read(at("model_cfg", "vision_cfg", "image_size"))
        return ImageSizes(positions, read(at("preprocess_cfg", "size")) or positions)
    if is_of_fovea(document):
        size = read(at("fovea", "method", "views", "global_size"))
        return ImageSizes(size, size)
    if isinstance(document.get("architecture"), str):  # timm
        shown = document["pretrained_cfg"] if isinstance(document.get("pretrained_cfg"), dict) else document
        named = shown.get("input_size")
        images = None if named is None else input_size(named, where=where)
        return ImageSizes(read(at("model_args", "img_size")) or images, images)
    vision = document["vision_config"] if isinstance(document.get("vision_config"), dict) else document
    positions, crop = read(vision.get("image_size")), at("crop_size", within=pixels or {})
    if isinstance(crop, dict):
        crop = [crop["height"], crop.get("width", crop["height"])] if "height" in crop else crop.get("shortest_edge")
    return ImageSizes(positions, read(crop) or positions)


def is_of_fovea(document: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` is of an export in fovea's own layout. In timm's, ``fovea`` names the channels alone."""
    return isinstance(document.get("fovea"), dict) and not isinstance(document.get("architecture"), str)


def per_channel(value: Any, count: int, *, where: str, positive: bool = False) -> tuple[float, ...]:
    """One number for each channel.

    Raises:
        CheckpointError: there are not as many, or one is not finite, or not above 0 where required.
    """
    numbers = value if isinstance(value, list | tuple) else ()
    if len(numbers) == count and all(type(v) in (int, float) and math.isfinite(v) for v in numbers):
        values = tuple(map(float, numbers))
        if not positive or min(values) > 0:
            return values
    raise CheckpointError(f"mean and std must be {'three' if count == 3 else count} numbers", where=where, hint=_HINT)


def three(value: Any, *, where: str, positive: bool = False) -> tuple[float, float, float]:
    """One number each for red, green and blue; errors as for :func:`per_channel`."""
    red, green, blue = per_channel(value, 3, where=where, positive=positive)
    return red, green, blue
