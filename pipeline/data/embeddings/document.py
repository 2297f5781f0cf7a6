"""The document ``embeddings.json`` of a folder of embeddings: what was embedded, by which weights, and the file of each shard.

It is written last: a folder without it is incomplete.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.data.augment.views import channel_spec
from pipeline.data.channel_settings import MAX_CHANNELS, ChannelSettings
from pipeline.data.formats.channels import DicomValues, Dtype
from pipeline.data.storage import write_atomically
from pipeline.errors import DataError
from pipeline.untrusted import UNPRINTABLE, plain_name, printable, read_json

FILE = "embeddings.json"
FORMAT = 1
MAX_DIM = 1 << 16
_MAX_DOCUMENT = 1 << 30  # bytes: about two million shards
_MAX_STEM = 180  # bytes of a shard's name in the name of its file
_STRICT = ConfigDict(extra="forbid", strict=True)
_HINT = "Restore the folder, or embed again into another one"

Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=1 << 14)]
Text = Annotated[str, Field(max_length=4096)]
Position = Annotated[int, Field(strict=True, ge=0, lt=MAX_CHANNELS)]
PerChannel = Annotated[tuple[float, ...], Field(min_length=1, max_length=64)]
Pooling = Literal["cls", "mean", "patches"]
DType = Literal["float16", "float32"]


@dataclass(frozen=True)
class EmbeddedChannels:
    """Channels of images that are not 8-bit RGB.

    Attributes:
        names: of the channels, in order.
        dtype: type of their values.
        members: extensions of the files that make one image; empty if one file has all channels.
        dicom: values of DICOM files, ``full`` or ``window``.
        composite: positions of the channels that are shown as red, green and blue (a single one as gray), or ``pca``.
    """

    __pydantic_config__ = _STRICT

    names: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MAX_CHANNELS)]
    dtype: Dtype
    composite: Annotated[tuple[Position, ...], Field(min_length=1, max_length=3)] | Literal["pca"]
    members: Annotated[tuple[Text, ...], Field(max_length=MAX_CHANNELS)] = ()
    dicom: DicomValues = "full"

    def __post_init__(self) -> None:
        if self.composite != "pca" and (len(self.composite) == 2 or max(self.composite, default=0) >= len(self.names)):
            raise ValueError("the composite names other channels than there are")
        _ = self.settings  # whose rules hold here too

    @property
    def settings(self) -> ChannelSettings:
        """``data.channels`` with which the same images are read."""
        names = self.names
        shown = self.composite if self.composite == "pca" else tuple(names[at] for at in self.composite)
        return ChannelSettings.model_validate(
            {"count": len(names), "names": names, "dtype": self.dtype, "members": self.members, "dicom": self.dicom}
            | ({"composite": shown} if len(shown) == 3 else {})
        )

    @classmethod
    def of(cls, settings: ChannelSettings | None) -> EmbeddedChannels | None:
        """The channels of ``data.channels``; ``None`` for 8-bit RGB."""
        spec = channel_spec(settings)
        if settings is None or spec is None:
            return None
        return cls(spec.names, settings.dtype, spec.composite, settings.members, settings.dicom)


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the input of the network.

    Attributes:
        size: side of the square input, or height and width, pixels.
        crop_fraction: sides of the crop as a share of those of the largest one with the aspect ratio of the input.
        crop_position: position of the crop along the side that it does not fill, 0.5 for the middle.
        interpolation: of the antialiased resizing of the crop to ``size``.
        mean, std: of the normalization, as fractions of full intensity.
        channels: of the images; ``None`` for 8-bit RGB.
    """

    __pydantic_config__ = _STRICT

    size: Pixels | tuple[Pixels, Pixels] = 224
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    crop_position: Annotated[float, Field(ge=0, le=1)] = 0.5
    mean: PerChannel = (0.485, 0.456, 0.406)
    std: PerChannel = (0.229, 0.224, 0.225)
    channels: EmbeddedChannels | None = None


@dataclass(frozen=True)
class WeightsSpec:
    """The weights that embedded.

    Attributes:
        source: as it was named, without credentials.
        name: of the checkpoint, folder or model.
        digest: SHA-256 over the network's tensors and their names, hex.
    """

    __pydantic_config__ = _STRICT

    source: Text = ""
    name: Text = ""
    digest: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


@dataclass(frozen=True)
class EmbeddingSpec:
    """What was embedded; equal for all files of a folder.

    Attributes:
        pooling: class token, mean of the patch tokens, or patch tokens.
        dim: numbers in an embedding.
        dtype: of the stored numbers.
        patches: patch tokens of each image with the pooling ``patches``, else 0.
        weights: the network.
        image: its input.
        batch_size: images of a forward pass; kernels may round differently with another one.
        precision: ``bf16`` for autocast, else ``fp32``.
        device: ``cpu`` or ``cuda``.
        threads: of a CPU that compute together, for the same reason; 0 on a GPU.
    """

    __pydantic_config__ = _STRICT

    pooling: Pooling
    dim: Annotated[int, Field(strict=True, ge=1, le=MAX_DIM)]
    dtype: DType
    patches: Annotated[int, Field(strict=True, ge=0, le=1 << 20)] = 0
    weights: WeightsSpec = field(default_factory=WeightsSpec)
    image: ImageSpec = field(default_factory=ImageSpec)
    batch_size: Annotated[int, Field(strict=True, ge=1, le=1 << 20)] = 64
    precision: Text = "fp32"
    device: Text = "cpu"
    threads: Count = 1

    @property
    def rows_per_sample(self) -> int:
        """Rows of the table for each embedded sample."""
        return self.patches or 1


@dataclass(frozen=True)
class EmbeddedShard:
    """The embeddings of one shard.

    Attributes:
        url: of the shard, without credentials.
        name: its base name.
        digest: hash of its samples, see :attr:`pipeline.data.index.shard_table.Shard.digest`.
        samples: accepted samples of the shard.
        file: name of the Parquet file.
        rows: its rows.
        bytes: its size.
        sha256: of its content, hex.
        bad: samples that could not be embedded; they have no row.
    """

    __pydantic_config__ = _STRICT

    url: Text
    name: Text
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    samples: Annotated[int, Field(strict=True, ge=0, le=1 << 32)]
    file: Text
    rows: Count
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bad: Count = 0


@dataclass(frozen=True)
class EmbeddingDocument:
    """Content of ``embeddings.json``.

    Attributes:
        spec: what was embedded.
        fingerprint: of the data set, see :attr:`pipeline.data.index.manifest.Manifest.fingerprint`.
        shards: in the order of the data set's shards, which numbers the samples.
    """

    __pydantic_config__ = _STRICT

    spec: EmbeddingSpec
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    shards: tuple[EmbeddedShard, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Samples of the data set, embedded ones, rows of all files, and bad samples."""
        samples, bad = sum(shard.samples for shard in self.shards), sum(shard.bad for shard in self.shards)
        return {"samples": samples, "embedded": samples - bad, "rows": sum(shard.rows for shard in self.shards), "bad": bad}

    def save(self, directory: Path) -> None:
        """Writes ``embeddings.json`` atomically."""
        document = {"format": FORMAT, **asdict(self), "counts": self.counts}
        write_atomically(directory / FILE, (json.dumps(document, indent=1) + "\n").encode())


_DOCUMENT = TypeAdapter(EmbeddingDocument)
SPEC = TypeAdapter(EmbeddingSpec)
SHARD = TypeAdapter(EmbeddedShard)


def file_name(number: int, shard: str) -> str:
    """Name of the Parquet file of a shard.

    Args:
        number: of the shard in the data set.
        shard: its base name.
    """
    stem = shard.removesuffix(".tar")
    stem = re.sub(rf"{UNPRINTABLE.pattern}|[/\\\\%*?\"<>|:]", "_", stem)
    while len(stem.encode()) > _MAX_STEM:
        stem = stem[:-1]
    return f"{number:05d}-{stem}.parquet"


def load(directory: Path) -> EmbeddingDocument:
    """Reads and validates ``embeddings.json``.

    Raises:
        DataError: it is missing, damaged, of another format, or contradicts itself.
    """
    path = directory / FILE
    where = printable(str(path))
    try:
        document = read_json(path, limit=_MAX_DOCUMENT)
    except OSError as error:
        hint = "Run `fovea embed` again, which continues where it was interrupted"
        raise DataError(f"cannot be read ({error.strerror})", where=where, hint=hint) from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise DataError(f"must be a description of embeddings of format {FORMAT}", where=where, hint=_HINT)
    counts = document.pop("counts", None)
    parsed: EmbeddingDocument = validated(_DOCUMENT, document, where)
    for number, shard in enumerate(parsed.shards):
        _check(parsed.spec, shard, number, where)
    if counts != parsed.counts:
        raise DataError("its counts do not match its shards", where=where, hint=_HINT)
    return parsed


def validated(kind: TypeAdapter[Any], document: Any, where: str) -> Any:
    """Validates a JSON value.

    Raises:
        DataError: it has another form.
    """
    try:
        return kind.validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(
            f"is damaged ({printable(key, limit=80)}: {printable(first['msg'], limit=120)})", where=where, hint=_HINT
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is damaged ({printable(str(error), limit=120)})", where=where, hint=_HINT) from None


def _check(spec: EmbeddingSpec, shard: EmbeddedShard, number: int, where: str) -> None:
    plain_name(shard.file, where=where)
    if not (shard.file.startswith(f"{number:05d}-") and shard.file.endswith(".parquet")):
        raise DataError(f"{printable(shard.file, limit=80)!r} must begin with the shard's number", where=where, hint=_HINT)
    if shard.bad > shard.samples or shard.rows != (shard.samples - shard.bad) * spec.rows_per_sample:
        raise DataError(f"shard {number} has {shard.rows} rows for {shard.samples} samples", where=where, hint=_HINT)
    if shard.rows * spec.dim * (2 if spec.dtype == "float16" else 4) > shard.bytes:  # numbers are stored plainly
        raise DataError(f"shard {number} has {shard.rows} rows in {shard.bytes} bytes", where=where, hint=_HINT)
    if (spec.patches > 0) != (spec.pooling == "patches"):
        raise DataError(f"{spec.patches} patches do not fit the pooling {spec.pooling}", where=where, hint=_HINT)
