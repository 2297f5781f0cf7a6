"""What an image of declared channels must be, and what a file's header says it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.data.channel_settings import MAX_CHANNELS, ChannelSettings

__all__ = ["DTYPES", "MAX_CHANNELS", "BadImage", "Channels", "Dtype", "Header", "channels_identity", "full_range", "required"]

Dtype = Literal["uint8", "uint16", "float32"]
DicomValues = Literal["full", "window"]
DTYPES: tuple[Dtype, ...] = ("uint8", "uint16", "float32")
_FULL: dict[str, float] = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


@dataclass(frozen=True)
class Channels:
    """The channels that every image of a data set must have.

    Attributes:
        count: number of channels, 1 to 16.
        dtype: type of their values.
        members: extensions of the files that make one image, in the order of the channels; empty if one file has all of them.
        dicom: values of a DICOM file: ``full``, as stored (or, as float32, after the file's rescaling), or ``window``,
            its first window mapped to the full range.
    """

    count: int
    dtype: Dtype
    members: tuple[str, ...] = ()
    dicom: DicomValues = "full"

    @property
    def full_range(self) -> float:
        """The value that the normalization calls one: the largest of an integer type; 1 for float32."""
        return full_range(self.dtype)

    @property
    def value_bytes(self) -> int:
        """Bytes of one value."""
        return np.dtype(self.dtype).itemsize


def required(settings: ChannelSettings | None) -> Channels | None:
    """What ``data.channels`` requires of every image; ``None`` for 8-bit RGB."""
    return None if settings is None else Channels(settings.count, settings.dtype, settings.members, settings.dicom)


def channels_identity(channels: Channels | None) -> list[Any] | None:
    """What determines the values of images, as JSON; ``None`` for 8-bit RGB. The hash of the shards does not cover it."""
    return None if channels is None else [channels.count, channels.dtype, list(channels.members), channels.dicom]


def full_range(dtype: str) -> float:
    """See :attr:`Channels.full_range`."""
    return _FULL[dtype]


class BadImage(Exception):
    """Raised by the readers of this package for a file that they refuse; the text is a status of the index."""


@dataclass(frozen=True)
class Header:
    """What a file's header says of its image.

    Attributes:
        kind: ``tiff``, ``png``, ``npy``, ``dicom`` or ``stack``.
        height, width: pixels as displayed (orientation applied).
        count: number of channels.
        dtype: numpy's name of the type of the values, in native byte order.
    """

    kind: str
    height: int
    width: int
    count: int
    dtype: str
