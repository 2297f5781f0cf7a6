"""Rules of an index: which members make a sample, and the values that its columns can have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, InstanceOf

from pipeline.data.formats.channels import Channels
from pipeline.errors import DataError

FORMAT = 3  # 2: lists of captions in JSON; 3: one rule for labels and for the encoding of captions
CHANNEL_FORMAT = 2  # of images of declared channels; 2: the orientation of PNG is applied
STATUSES = (
    "ok",
    "missing_image",
    "missing_caption",
    "missing_label",
    "missing_segmentation",
    "not_image",
    "unsupported",
    "truncated",
    "too_large",
    "too_small",
    "duplicate_key",
    "not_adjacent",
    "undecodable",
    "other_channels",
    "other_dtype",
    "other_size",
    "unselected",
)
COUNTED = 13
"""Number of statuses that every table of shards counts; later ones are counted only where they occur."""
FORMATS = ("none", "jpeg", "png", "webp", "tiff", "bmp", "jpeg2000", "pnm", "npy", "dicom", "stack")
CAPTION_SOURCES = ("none", "text", "json")
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
Text = InstanceOf[str]  # pydantic's own type rejects names that are not UTF-8


@dataclass(frozen=True)
class Fields:
    """Which members make a sample, and which samples are accepted.

    Attributes:
        images: extensions of the image, in order of preference.
        caption: extension of the caption, UTF-8 text.
        caption_lines: whether each line of that member is a separate caption.
        label: extension of the class index, decimal text.
        segmentation: extension of the segmentation map (one byte per pixel, PNG).
        json: extension of a JSON object, read for parts that have no member of their own.
        json_caption: key of the caption in it: a string, or a list of strings, each of them a caption.
        json_label: key of the class index in it.
        require: of ``caption``, ``label``, ``segmentation`` those without which a sample is rejected.
        min_side: minimum width and height, pixels.
        max_pixels: maximum pixels, by the header: larger images are never decoded.
        channels: what images of other than 8-bit RGB must be; ``None`` for images that are decoded to 8-bit RGB.
    """

    images: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "jp2", "ppm")
    caption: str = "txt"
    label: str = "cls"
    segmentation: str = "seg.png"
    json: str = "json"
    json_caption: str = "caption"
    json_label: str = "label"
    require: tuple[str, ...] = ()
    min_side: int = 16
    max_pixels: int = 50_000_000
    caption_lines: bool = False
    channels: Channels | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.require) - {"caption", "label", "segmentation"})
        if unknown:
            raise DataError(
                f"{unknown[0]!r} cannot be required", where="require", hint="Choose one of caption, label, segmentation"
            )
        if not self.images:
            raise DataError("no image extension is given", where="images", hint="Name at least one, such as jpg")

    def document(self) -> dict[str, Any]:
        """The rules as JSON, equal to that of versions without declared channels where there are none."""
        document = asdict(self)
        if self.channels is None:
            del document["channels"]
        return document

    @classmethod
    def of(cls, document: dict[str, Any]) -> Fields:
        """Parses the rules from a JSON object."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}
        return cls(**values)
