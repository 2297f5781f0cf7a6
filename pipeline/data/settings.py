"""Settings of the data: shards, mixtures of data sets, object storage."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.types import (
    RUNTIME,
    Count,
    FilePath,
    NonNegative,
    Positive,
    Probability,
    SelectionFiles,
    Settings,
    Shards,
    Texts,
)
from pipeline.data.channel_settings import ChannelSettings
from pipeline.errors import ConfigError

SCIENTIFIC_EXTENSIONS = ("npy", "dcm", "dicom")
"""Extensions of images that only ``channels`` reads, beside ``image_extensions``."""


class StorageSettings(Settings):
    """How shards in object storage are accessed, and how much of them a node caches."""

    endpoint: str | None = Field(
        default=None, description="URL of an S3-compatible or Azure endpoint; null means AWS_ENDPOINT_URL"
    )
    region: str | None = Field(default=None, description="region of the bucket; null means AWS_REGION")
    anonymous: bool = Field(default=False, description="access public buckets without credentials")
    access: Literal["cache", "range_read"] = Field(
        default="cache",
        description="cache: download entire shards to the node's disk; range_read: fetch each sample with a range request",
    )
    cache: FilePath | None = Field(
        default=None, description="directory of cached shards; null means FOVEA_CACHE, SLURM_TMPDIR or the temporary directory"
    )
    cache_gb: Positive | None = Field(
        default=None, description="maximum size of the cache, GB; null means 80 % of the free disk space"
    )
    free_gb: NonNegative = Field(default=2.0, description="disk space that the cache leaves free, GB")
    part_size_mb: Count = Field(default=16, description="size of one request of a download, MB")
    download_concurrency: int = Field(default=8, ge=1, le=256, description="concurrent requests of a download")
    timeout: Positive = Field(default=60.0, description="timeout of one request, seconds")
    retries: int = Field(default=5, ge=0, le=100, description="immediate retries of a failed request")
    outage_timeout: NonNegative = Field(
        default=600.0, description="seconds that training waits for unavailable storage before it stops"
    )


class SourceSettings(Settings):
    """One data set of a mixture."""

    name: str = Field(
        min_length=1, max_length=64, pattern=r"^[\w.+-]+$", description="name of the data set in reported sample counts"
    )
    shards: Shards = Field(
        min_length=1, description="shards of the data set: a path or URL with {000..123} or *, or a list of them"
    )
    weight: Positive | None = Field(
        default=None, description="sampling weight relative to the other data sets; null means proportional to size and repeat"
    )
    repeat: Positive | None = Field(
        default=None, description="epochs of this data set during one epoch of a data set with repeat 1; null means 1"
    )
    selection: SelectionFiles = Field(
        default=(), description="selections of this data set's samples, as data.selection of a single data set"
    )


class DataSettings(Settings):
    """Where samples are stored and how they are read."""

    shards: Shards = Field(
        default=(),
        json_schema_extra=RUNTIME,
        description="training shards: a path or URL with {000..123} or *, or a list of them",
    )
    sources: tuple[SourceSettings, ...] | None = Field(
        default=None,
        json_schema_extra=RUNTIME,
        description="a mixture of data sets, used instead of shards; each has name, shards, and weight or repeat",
    )
    selection: SelectionFiles = Field(
        default=(),
        json_schema_extra=RUNTIME,
        description="files that select samples and weight them (fovea shards dedup, balance, retrieve); a sample is used if all "
        "of them select it",
    )
    index: FilePath | None = Field(
        default=None, json_schema_extra=RUNTIME, description="directory of the shard index; null means the user's cache directory"
    )
    storage: StorageSettings = Field(
        default=StorageSettings(), json_schema_extra=RUNTIME, description="object storage and the node's shard cache"
    )
    canonical_streams: Count | None = Field(
        default=None,
        description="number of streams into which the global order is divided, a divisor of the global batch size; fewer mean "
        "fewer shards in use at a time (fovea estimate shows how many); null means the greatest common divisor of the global "
        "batch size and 256, or, where the shards of the first step would have more than 256 GiB, about one for 512 samples of "
        "the batch, and at least 8",
    )
    shuffle_block_size: Count = Field(default=16384, description="number of samples shuffled together")
    image_extensions: Texts = Field(
        default=("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "jp2", "ppm"),
        min_length=1,
        description="file extensions of a sample's image, in order of preference",
    )
    channels: ChannelSettings | None = Field(
        default=None,
        description="channels of scientific images: TIFF, PNG, NumPy or DICOM with 8 or 16 bits or float32; null decodes every "
        "image to 8-bit RGB",
    )
    caption_extension: str = Field(default="txt", description="file extension of a sample's caption")
    caption_lines: bool = Field(
        default=False, description="treat each line of a caption file as one caption; each epoch uses one of them"
    )
    missing_caption: Literal["exclude", "blank"] = Field(
        default="exclude",
        description="samples without a caption, for methods that read text: exclude them, or use an empty caption",
    )
    label_extension: str = Field(default="cls", description="file extension of a sample's class index")
    min_side: Count = Field(default=16, description="minimum side of an image, pixels")
    max_pixels: Count = Field(
        default=50_000_000,
        description="maximum area of an image, pixels; of an image of more than three channels, the area of which as many values "
        "make three channels",
    )
    on_truncated_shard: Literal["error", "keep-readable"] = Field(
        default="error",
        description="shards whose tar is truncated or damaged: stop with an error, or use the samples before the damage",
    )
    num_workers: int = Field(
        default=1,
        ge=0,
        le=64,
        json_schema_extra=RUNTIME,
        description="data loading processes per rank; 0 loads in the rank's own process",
    )
    decode_threads: int = Field(default=2, ge=1, le=256, json_schema_extra=RUNTIME, description="decoding threads per rank")
    prefetch: int = Field(default=2, ge=1, le=64, json_schema_extra=RUNTIME, description="batches prepared in advance")
    max_bad_fraction: Probability = Field(
        default=0.01, json_schema_extra=RUNTIME, description="fraction of unusable samples above which the run stops"
    )
    bad_fraction_window: Count = Field(
        default=10_000, json_schema_extra=RUNTIME, description="number of samples over which max_bad_fraction is measured"
    )
    verify_checksums: bool = Field(
        default=True, json_schema_extra=RUNTIME, description="compare each image's bytes with the checksum in the index"
    )

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if not self.shards and self.sources is None:
            raise PydanticCustomError("shards", "is required")
        if self.shards and self.sources is not None:
            raise PydanticCustomError(
                "shards", "and data.sources are both given; give one of them (data.shards=[] takes it back)"
            )
        sources = self.sources or ()
        if self.sources is not None and not sources:
            raise PydanticCustomError("sources", "names no data set")
        if len({source.name for source in sources}) < len(sources):
            raise PydanticCustomError("sources", "has two data sets of one name")
        if sources and self.selection:
            raise PydanticCustomError("selection", "cannot be given with data.sources; give each data set its own selection")
        for source in sources:
            if source.weight is not None and source.repeat is not None:
                raise PydanticCustomError("sources", "gives {name} both weight and repeat", {"name": source.name})
            if (source.weight is None) != (sources[0].weight is None):
                raise PydanticCustomError("sources", "gives some data sets a weight and others none")
        return self

    @property
    def images(self) -> tuple[str, ...]:
        """Extensions of images: with ``channels`` also those of NumPy and DICOM, or those of the files that make one image."""
        if self.channels is None:
            return self.image_extensions
        own = dict.fromkeys((*self.image_extensions, *SCIENTIFIC_EXTENSIONS))
        return self.channels.members or tuple(own)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of all training shards, of one data set or of a mixture."""
        return self.shards or tuple(pattern for source in self.sources or () for pattern in source.shards)

    @property
    def selection_files(self) -> tuple[Path, ...]:
        """Selections of the training samples, of one data set or of all of a mixture."""
        return self.selection or tuple(file for source in self.sources or () for file in source.selection)

    def index_folder(self, urls: Sequence[str]) -> Path:
        """Returns the index directory of these shards: one named after them, in ``index`` or in the user's cache directory.

        Raises:
            ConfigError: there is no cache directory because the user has no home directory.
        """
        name = hashlib.sha256("\n".join(os.path.abspath(url) if "://" not in url else url for url in urls).encode()).hexdigest()
        return self.index_root / name[:16]

    @property
    def index_root(self) -> Path:
        """Directory of all indexes: ``index``, or one in the user's cache directory.

        Raises:
            ConfigError: there is no cache directory because the user has no home directory.
        """
        return Path(os.path.abspath(self.index or user_cache() / "fovea" / "index"))


def user_cache() -> Path:
    """The user's cache directory.

    Raises:
        ConfigError: the user has no home directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user ID without a name, as in containers, and no HOME
        raise ConfigError(
            f"user {os.getuid()} has no home directory for the index of the shards",
            where="data.index",
            hint="Set it to a folder, or the variable XDG_CACHE_HOME",
        )
    return Path(cache)
