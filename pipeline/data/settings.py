"""Settings of the data: shards, data sets that are mixed, object storage."""

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
    Settings,
    Shards,
    Texts,
)
from pipeline.errors import ConfigError


class StorageSettings(Settings):
    """How shards in object storage are reached, and what a node keeps of them."""

    endpoint: str | None = Field(default=None, description="URL of an S3-compatible or Azure server; null means AWS_ENDPOINT_URL")
    region: str | None = Field(default=None, description="region of the bucket; null means AWS_REGION")
    anonymous: bool = Field(default=False, description="read public buckets without credentials")
    access: Literal["cache", "range_read"] = Field(
        default="cache", description="keep whole shards on the node's disk, or read each sample by range"
    )
    cache: FilePath | None = Field(
        default=None, description="folder of kept shards; null means FOVEA_CACHE, SLURM_TMPDIR or the temporary folder"
    )
    cache_gb: Positive | None = Field(default=None, description="most GB kept; null means four fifths of the free disk")
    free_gb: NonNegative = Field(default=2.0, description="GB of the disk that stay free")
    part_size_mb: Count = Field(default=16, description="MB of one request of a download")
    download_concurrency: int = Field(default=8, ge=1, le=256, description="requests of a download at a time")
    timeout: Positive = Field(default=60.0, description="seconds one request may take")
    retries: int = Field(default=5, ge=0, le=100, description="quick retries of one request")
    outage_timeout: NonNegative = Field(
        default=600.0, description="seconds a training waits for a storage that is away, before it stops"
    )


class SourceSettings(Settings):
    """One of several data sets that are mixed."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.+-]+$", description="what the data set is called in counts")
    shards: Shards = Field(min_length=1, description="its shards: a path or URL with {000..123} or *, or a list of them")
    weight: Positive | None = Field(
        default=None, description="share of the samples, relative to the other sets' weights; null means by size and repeat"
    )
    repeat: Positive | None = Field(
        default=None, description="how often its samples come while a set with repeat 1 is seen once; null means 1"
    )


class DataSettings(Settings):
    """Where samples come from and how they are read."""

    shards: Shards = Field(
        default=(),
        json_schema_extra=RUNTIME,
        description="training shards: a path or URL with {000..123} or *, or a list of them",
    )
    sources: tuple[SourceSettings, ...] | None = Field(
        default=None,
        json_schema_extra=RUNTIME,
        description="several data sets instead of shards, each with name, shards, and weight or repeat",
    )
    index: FilePath | None = Field(
        default=None, json_schema_extra=RUNTIME, description="folder of the shard index; null means the user's cache"
    )
    storage: StorageSettings = Field(
        default=StorageSettings(), json_schema_extra=RUNTIME, description="object storage and the node's cache"
    )
    canonical_streams: Count | None = Field(default=None, description="shards read side by side; null chooses from the data set")
    shuffle_block_size: Count = Field(default=16384, description="samples shuffled together")
    image_extensions: Texts = Field(
        default=("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "jp2", "ppm"),
        min_length=1,
        description="extensions of a sample's picture, the preferred one first",
    )
    caption_extension: str = Field(default="txt", description="extension of a sample's caption")
    caption_lines: bool = Field(
        default=False, description="each line of a caption member is a caption, of which an epoch shows one"
    )
    missing_caption: Literal["exclude", "blank"] = Field(
        default="exclude", description="samples without a caption, where the method reads text: left out, or with an empty one"
    )
    label_extension: str = Field(default="cls", description="extension of a sample's class number")
    min_side: Count = Field(default=16, description="smallest accepted side, pixels")
    max_pixels: Count = Field(default=50_000_000, description="largest accepted area, pixels")
    on_truncated_shard: Literal["error", "keep-readable"] = Field(
        default="error", description="shards whose tar breaks off or is damaged: stop, or use the samples before the damage"
    )
    num_workers: int = Field(
        default=1, ge=0, le=64, json_schema_extra=RUNTIME, description="feeder processes of a rank; 0 reads in the rank itself"
    )
    decode_threads: int = Field(default=2, ge=1, le=256, json_schema_extra=RUNTIME, description="decoding threads of a rank")
    prefetch: int = Field(default=2, ge=1, le=64, json_schema_extra=RUNTIME, description="batches prepared ahead")
    max_bad_fraction: Probability = Field(
        default=0.01, json_schema_extra=RUNTIME, description="share of unusable samples that stops the run"
    )
    bad_fraction_window: Count = Field(
        default=10_000, json_schema_extra=RUNTIME, description="samples over which bad_budget is counted"
    )
    verify_checksums: bool = Field(
        default=True, json_schema_extra=RUNTIME, description="compare each picture's bytes with the index's checksum"
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
        for source in sources:
            if source.weight is not None and source.repeat is not None:
                raise PydanticCustomError("sources", "gives {name} both weight and repeat", {"name": source.name})
            if (source.weight is None) != (sources[0].weight is None):
                raise PydanticCustomError("sources", "gives some data sets a weight and others none")
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of all training shards, of one data set or of several."""
        return self.shards or tuple(pattern for source in self.sources or () for pattern in source.shards)

    def index_folder(self, urls: Sequence[str]) -> Path:
        """Where the index of these shards is kept: a folder named after them in ``index`` or in the user's cache.

        Raises:
            ConfigError: there is no such cache, since the user has no home directory.
        """
        name = hashlib.sha256("\n".join(os.path.abspath(url) if "://" not in url else url for url in urls).encode()).hexdigest()
        return (self.index or _user_cache() / "fovea" / "index") / name[:16]


def _user_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user ID without a name, as containers have, and no HOME
        raise ConfigError(
            f"user {os.getuid()} has no home directory for the index of the shards",
            where="data.index",
            hint="set it to a folder, or the variable XDG_CACHE_HOME",
        )
    return Path(cache)
