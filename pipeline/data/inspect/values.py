"""Measures the values of images with declared channels: range, percentiles, mean and deviation of each channel, in one pass.

Memory is bounded: a histogram of 65 536 bins for each channel. It is exact for integers; of float32, a bin holds the values that
agree in their first 16 bits (0.8 %), and mean and deviation are summed separately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import storage
from pipeline.data.channel_settings import ChannelSettings
from pipeline.data.formats import read
from pipeline.data.formats.channels import Channels, full_range, required
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.reader import Reader
from pipeline.data.order.random import choose
from pipeline.errors import ConfigError, DataError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_BINS = 1 << 16
_DRAW = 0x57A7  # identifies the random draw
_BATCH = 16  # images read at once


@dataclass(frozen=True)
class ChannelValues:
    """Values of one channel, as stored.

    Attributes:
        name: of the channel.
        minimum, maximum: of all values.
        mean, std: mean and standard deviation of all values.
        percentiles: value at each of :data:`PERCENTILES`.
    """

    name: str
    minimum: float
    maximum: float
    mean: float
    std: float
    percentiles: tuple[float, ...]


@dataclass(frozen=True)
class Values:
    """Values of all channels.

    Attributes:
        channels: the channels in order.
        settings: what the images were declared to have.
        images: number of images measured.
        failed: number of images that could not be decoded.
    """

    channels: tuple[ChannelValues, ...]
    settings: ChannelSettings
    images: int
    failed: int

    @property
    def full_range(self) -> float:
        """The value that the normalization calls one."""
        return full_range(self.settings.dtype)

    def document(self) -> dict[str, Any]:
        """Returns the values for JSON, with percentiles by number."""
        channels = [
            {**asdict(one), "percentiles": dict(zip(map(str, PERCENTILES), one.percentiles, strict=True))}
            for one in self.channels
        ]
        return {"images": self.images, "failed": self.failed, "dtype": self.settings.dtype, "channels": channels}

    def text(self) -> str:
        """Returns the values as a table."""
        failed = f", {self.failed} could not be decoded" if self.failed else ""
        heads = ("min", *(f"{p} %" for p in PERCENTILES), "max", "mean", "std")
        lines = [f"values of {self.images} images ({self.settings.dtype}){failed}"]
        lines.append(f"{'channel':16}" + "".join(f"{head:>10}" for head in heads))
        for one in self.channels:
            row = (one.minimum, *one.percentiles, one.maximum, one.mean, one.std)
            lines.append(f"{one.name[:16]:16}" + "".join(f"{value:>10.5g}" for value in row))
        return "\n".join(lines)

    def snippet(self, command: str) -> str:
        """Returns the section ``data.channels`` of a config, with mean and standard deviation as measured.

        Args:
            command: the command that measured them, for the header.

        Raises:
            DataError: a channel has the same value everywhere, and so no standard deviation.
        """
        import yaml

        flat = [one.name for one in self.channels if one.std == 0]
        if flat:
            raise DataError(
                f"{', '.join(flat)} has the same value in all images, so it cannot be normalized",
                where="data.channels",
                hint="Leave the channel out of the images, or measure more of them",
            )
        declared = self.settings.model_dump(mode="json", exclude_defaults=True)
        full = self.full_range
        measured = {
            "count": self.settings.count,
            "names": list(self.settings.labels),
            "dtype": self.settings.dtype,
            "mean": [float(f"{one.mean / full:.7g}") for one in self.channels],
            "std": [float(f"{one.std / full:.7g}") for one in self.channels],
        }
        body = yaml.safe_dump({"data": {"channels": declared | measured}}, sort_keys=False, default_flow_style=None, width=120)
        unit = "in the channels' own units" if self.settings.dtype == "float32" else f"fractions of {full:.0f}"
        return f"# {command}\n# {self.images} images; mean and std are {unit}\n{body}"


class _Sums:
    """Running statistics of one data set."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._counts = np.zeros((channels.count, _BINS), dtype=np.int64)
        self._low = np.full(channels.count, np.inf)
        self._high = np.full(channels.count, -np.inf)
        self._mean, self._squares, self._n = np.zeros(channels.count), np.zeros(channels.count), 0

    def add(self, image: NDArray[Any]) -> None:
        flat = image.reshape(-1, self._channels.count)
        self._low, self._high = np.minimum(self._low, flat.min(0)), np.maximum(self._high, flat.max(0))
        for c in range(self._channels.count):
            self._counts[c] += np.bincount(_bins(np.ascontiguousarray(flat[:, c])), minlength=_BINS)
        # Of float32 the mean is not that of the bins: those of the images are merged (Chan et al., 1979).
        n, mean = len(flat), flat.mean(0, dtype=np.float64)
        squares = ((flat - mean) ** 2).sum(0, dtype=np.float64)
        total, step = self._n + n, mean - self._mean
        self._squares += squares + step**2 * self._n * n / total
        self._mean += step * n / total
        self._n = total

    def result(self, names: Sequence[str]) -> tuple[ChannelValues, ...]:
        std = np.sqrt(self._squares / max(self._n, 1))
        values = _values_of_bins(self._channels.dtype)
        rows = []
        for c, name in enumerate(names):
            low, high = float(self._low[c]), float(self._high[c])
            ends = np.cumsum(self._counts[c])
            at = np.searchsorted(ends, [np.ceil(p / 100 * self._n) for p in PERCENTILES])
            shown = tuple(float(np.clip(values[min(one, _BINS - 1)], low, high)) for one in at)
            rows.append(ChannelValues(name, low, high, float(self._mean[c]), float(std[c]), shown))
        return tuple(rows)


def _bins(values: NDArray[Any]) -> NDArray[np.int64]:
    """Bins in the order of the values: the values of integers; of float32 the first 16 bits, the negative ones reversed."""
    if values.dtype != np.float32:
        return values.astype(np.int64)
    bits = values.view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> 16).astype(np.int64)


def _values_of_bins(dtype: str) -> NDArray[np.float64]:
    """The middle of each bin."""
    bins = np.arange(_BINS, dtype=np.uint32)
    if dtype != "float32":
        return bins.astype(np.float64)
    ordered = bins << np.uint32(16) | np.uint32(1 << 15)
    bits = np.where(ordered >> 31, ordered & np.uint32(0x7FFFFFFF), ~ordered)
    with np.errstate(invalid="ignore"):
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def measure(
    manifest: Manifest,
    settings: ChannelSettings,
    *,
    images: int = 2000,
    seed: int = 0,
    store: storage.Storage | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Values:
    """Measures images that are chosen from all shards.

    Args:
        manifest: an index with declared channels.
        settings: the declaration; names the channels.
        images: maximum number of images.
        seed: seed of the selection.
        store: access to the shards.
        progress: called with (images done, total images, "").

    Raises:
        ConfigError: the index has other channels.
        DataError: a shard is missing, or none of the images can be decoded.
    """
    channels = manifest.fields.channels
    if channels is None or channels != required(settings):
        raise ConfigError("the index is of other channels", where="data.channels", hint="Build it again with the same --channels")
    reader = Reader(manifest, wants=("image",), store=store)
    ids = manifest.ids(choose(manifest.total, images, seed, _DRAW))
    sums, failed, done = _Sums(channels), 0, 0
    for first in range(0, len(ids), _BATCH):
        for record in reader.fetch(ids[first : first + _BATCH]):
            image = None if record.image is None else read.decode(record.image, channels, max_pixels=manifest.fields.max_pixels)
            if image is None:
                failed += 1
            else:
                sums.add(image)
            done += 1
        if progress is not None:
            progress(done, len(ids), "")
    if done == failed:
        raise DataError(
            f"none of {done} images can be decoded",
            where=manifest.shards[0].url,
            hint="Run `fovea shards verify` to list all images that cannot be decoded",
        )
    return Values(sums.result(settings.labels), settings, done - failed, failed)
