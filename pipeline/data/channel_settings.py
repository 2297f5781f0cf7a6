"""Settings of the channels of scientific images (section ``data.channels``)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.types import RUNTIME, Positive, Settings, Texts

MAX_CHANNELS = 16


class ChannelSettings(Settings):
    """Channels of the images, where they are not 8-bit RGB: what every image must have, and how it is normalized."""

    count: int = Field(ge=1, le=MAX_CHANNELS, description="number of channels; an image with another number is left out")
    names: Texts = Field(default=(), description="names of the channels in their order; by default c1, c2 and so on")
    dtype: Literal["uint8", "uint16", "float32"] = Field(
        default="uint16", description="type of the values; an image of another type is left out"
    )
    members: Texts = Field(
        default=(),
        description="extensions of the files that make one image, in the order of the channels, such as [b02.tif, b03.tif]; "
        "empty if one file has all channels",
    )
    mean: tuple[float, ...] | None = Field(
        default=None,
        description="mean of each channel, as a fraction of the full range (uint8, uint16) or in its own unit (float32); "
        "`fovea shards stats --channels … --write FILE` measures it",
    )
    std: tuple[Positive, ...] | None = Field(default=None, description="standard deviation of each channel, in the unit of mean")
    rgb: tuple[str, str, str] | None = Field(
        default=None,
        description="names of the red, green and blue channel: hue, saturation, grayscale and solarization change these alone, "
        "and nothing where there are none",
    )
    groups: tuple[tuple[str, ...], ...] = Field(
        default=(),
        description="groups of channels, by name, that share their brightness and contrast factors; by default all do. "
        "Channels in no group form one more",
    )
    composite: tuple[str, str, str] | Literal["pca"] | None = Field(
        default=None,
        json_schema_extra=RUNTIME,
        description="channels that previews and reports show as red, green and blue, or pca for the image's three principal "
        "components; null means rgb, else the first three, or a single one as gray",
    )
    dicom: Literal["full", "window"] = Field(
        default="full",
        description="values of DICOM files: full is as stored (float32: after the file's rescaling), window is the file's first "
        "window over the full range",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = self.labels
        if len(names) != self.count or len(set(names)) < len(names):
            raise PydanticCustomError(
                "names",
                "names {given} channels, and there are {count}: give each its own",
                {"given": len(set(names)), "count": self.count},
            )
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and len(values) != self.count:
                raise PydanticCustomError(
                    "lengths",
                    "{key} has {given} values for {count} channels: give one for each",
                    {"key": key, "given": len(values), "count": self.count},
                )
        if (self.mean is None) != (self.std is None):
            raise PydanticCustomError("normalization", "gives mean or std alone: give both or neither")
        if len(set(self.members)) < len(self.members) or len(self.members) > self.count:
            raise PydanticCustomError("members", "members must be at most as many different extensions as there are channels")
        if any(one != one.lower() or one.startswith(".") or "/" in one for one in self.members):
            raise PydanticCustomError("members", "members are extensions in lower case without a leading dot, such as b02.tif")
        composite = self.composite if isinstance(self.composite, tuple) else ()
        for name in (*(self.rgb or ()), *(name for group in self.groups for name in group), *composite):
            if name not in names:
                raise PydanticCustomError(
                    "unknown", "has no channel {name}; its channels are {names}", {"name": repr(name), "names": ", ".join(names)}
                )
        grouped = [name for group in self.groups for name in group]
        if len(set(grouped)) < len(grouped) or (self.rgb is not None and len(set(self.rgb)) < 3):
            raise PydanticCustomError("twice", "names a channel twice in rgb or groups: name it once")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the channels, given or numbered from c1."""
        return self.names or tuple(f"c{number + 1}" for number in range(self.count))

    @property
    def group_numbers(self) -> tuple[int, ...]:
        """For each channel the number of its group; ungrouped ones share the last."""
        of = {name: number for number, group in enumerate(self.groups) for name in group}
        return tuple(of.get(name, len(self.groups)) for name in self.labels)

    @property
    def rgb_indices(self) -> tuple[int, int, int] | None:
        """Positions of the red, green and blue channel."""
        if self.rgb is None:
            return None
        red, green, blue = (self.labels.index(name) for name in self.rgb)
        return red, green, blue
