"""Values that options of the command line accept; help and completion list them. Only typer is imported: ``--help`` is fast."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import pipeline
from pipeline.errors import ConfigError

_ROOT = Path(pipeline.__path__[0])
_METHODS = sorted(file.parent.name for file in _ROOT.glob("methods/*/settings.py"))
_FORMATS = sorted(file.stem for file in _ROOT.glob("weights/export/formats/*.py") if file.stem != "__init__")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")

if TYPE_CHECKING:
    Method = str
    ExportFormat = str
else:
    Method = StrEnum("Method", _METHODS)  # one member for each folder below pipeline/methods
    ExportFormat = StrEnum("ExportFormat", _FORMATS)  # one member for each module in pipeline/weights/export/formats


class Network(StrEnum):
    """Network to export."""

    AUTO = "auto"
    TEACHER = "teacher"
    STUDENT = "student"


class Pooling(StrEnum):
    """Features of an image that are embedded."""

    CLS = "cls"
    MEAN = "mean"
    PATCHES = "patches"


class StoredType(StrEnum):
    """Data type of stored embeddings."""

    FP16 = "fp16"
    FP32 = "fp32"


class CoarseLevels(StrEnum):
    """How clusters are clustered."""

    AUTO = "auto"
    LINKAGE = "linkage"
    KMEANS = "kmeans"


class BalanceMode(StrEnum):
    """What balancing does with the samples of large clusters."""

    SUBSET = "subset"
    WEIGHTS = "weights"


class RetrieveMode(StrEnum):
    """Which images are retrieved."""

    NEAREST = "nearest"
    CLUSTERS = "clusters"


class Weights(StrEnum):
    """Weights of a checkpoint to convert."""

    TEACHER = "teacher"
    STUDENT = "student"
    BOTH = "both"


class Precision(StrEnum):
    """Data type of converted weights."""

    FP32 = "fp32"
    BF16 = "bf16"


class Trained(StrEnum):
    """Part of a pretrained tower that is trained."""

    ALL = "all"
    LAST_BLOCKS = "last_blocks"
    LORA = "lora"


class SceneShift(StrEnum):
    """Domain of the synthetic scenes."""

    NONE = "none"
    PALETTE = "palette"
    TEXTURE = "texture"
    MICROSCOPE = "microscope"


class Spectral(StrEnum):
    """Channels of the spectral set."""

    ALL = "all"
    RGB = "rgb"


class OnTruncated(StrEnum):
    """How truncated tars are handled."""

    ERROR = "error"
    KEEP_READABLE = "keep-readable"


class SourceLayout(StrEnum):
    """Layout of what is packed."""

    AUTO = "auto"
    FOLDER = "folder"
    FLAT = "flat"
    TABLE = "table"
    FILES = "files"
    SHARDS = "shards"


class ImageFormat(StrEnum):
    """Format of re-encoded images."""

    JPG = "jpg"
    PNG = "png"


class Labels(StrEnum):
    """How labels of a table are read."""

    AUTO = "auto"
    NAMES = "names"


class Device(StrEnum):
    """Device of a benchmark."""

    CPU = "cpu"
    CUDA = "cuda"


class VitSize(StrEnum):
    """Size of the ViT of benchmarks on random images."""

    TINY = "tiny"
    SMALL = "small"
    BASE = "base"
    LARGE = "large"


class StepMethod(StrEnum):
    """Method whose training step is compared."""

    CLIP = "clip"
    DINOV2 = "dinov2"


class RunOrder(StrEnum):
    """Order of the list of runs."""

    NAME = "name"
    STATE = "state"
    TIME = "time"
    HOURS = "hours"
    SCORE = "score"


class Question(StrEnum):
    """Group of collapse ablations."""

    BYOL = "byol"
    DINO = "dino"
    MOCOV2 = "mocov2"
    SIMCLR = "simclr"
    LOGO = "logo"


def output_stem(path: Path | None) -> Path | None:
    """Check an output path without extension, as callback of an option.

    Raises:
        ConfigError: it names no file.
    """
    if path is not None and path.name in ("", ".."):
        raise ConfigError(f"{str(path)!r} names no file", where="--out", hint="Choose a file name, without extension")
    return local_only(path)


def local_only(path: Path | None) -> Path | None:
    """Check an output path, as callback of an option or argument.

    Raises:
        ConfigError: it is a URL, of which a path would silently make a local folder.
    """
    if path is not None and (match := _URL.match(str(path))):
        raise ConfigError(
            f"is a URL; output is written to a local folder only, and {match[1]}: would become one",
            where=str(path).replace(":/", "://", 1),
            hint="Name a local folder, and copy it to the bucket afterwards",
        )
    return path


def size_option(meaning: str) -> Any:
    """The option ``--size``: a side in pixels, or height and width."""
    return typer.Option(metavar="PIXELS", help=f"Side of the images in pixels, or HEIGHTxWIDTH; {meaning}.")
