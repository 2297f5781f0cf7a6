"""Computes statistics of a data set from its index, without reading images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index.captions import REPLACED
from pipeline.data.index.fields import CAPTION_SOURCES, FORMATS
from pipeline.data.index.manifest import Manifest
from pipeline.data.inspect import duplicates
from pipeline.data.inspect.tally import Tally, pairs, percentiles, rounded_pairs
from pipeline.data.order.default_streams import default_streams, extents_of
from pipeline.data.order.order import BLOCK_SIZE, Order, divisors
from pipeline.errors import FoveaError
from pipeline.untrusted import printable, shown

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
SMALL_SHARD, LARGE_SHARD = 100_000_000, 1_000_000_000  # bytes; 200 to 500 MB are recommended
_TOP = 10


@dataclass(frozen=True)
class Spread:
    """Distribution of a value.

    Attributes:
        unit: of the values.
        mean: mean of all values.
        percentiles: value at each of :data:`PERCENTILES`.
    """

    unit: str
    mean: float
    percentiles: tuple[float, ...]


@dataclass(frozen=True)
class Duplicates:
    """Images that occur more than once, byte for byte (by checksum, size and sides).

    Attributes:
        pictures: number of distinct images with duplicates.
        superfluous: samples that deduplication would remove.
        labels_differ: how many of these images have several class indices.
        examples: the first few images, each as (shard, key) of at most four of its occurrences.
    """

    pictures: int
    superfluous: int
    labels_differ: int
    examples: tuple[tuple[tuple[str, str], ...], ...]


@dataclass(frozen=True)
class Statistics:
    """Statistics of a data set; only usable samples are counted, except in ``left_out``.

    Attributes:
        shards: number of shards.
        samples: number of samples.
        image_bytes: total size of the encoded images.
        shard_bytes: total size of the shards.
        fingerprint: of the data set.
        left_out: samples that cannot be used, by status.
        formats: images by format.
        spreads: distributions of width, height, aspect ratio (width/height), megapixels and encoded size of the images, of the
            captions' length in bytes (those in a text member) and of the shards' size and samples.
        captions: samples by where their caption is stored: text, json, none.
        noted: counts of irregular labels and captions, and of members that belong to no sample.
        labelled: samples with a class index.
        classes: largest class index plus one.
        empty_classes: class indices below it without a sample.
        largest: (class index, samples) of the largest classes.
        smallest: likewise of the smallest that have samples.
        duplicates: images that occur more than once.
        order: the resulting order: streams, steps and samples per epoch, possible world sizes.
        advice: recommendations.
    """

    shards: int
    samples: int
    image_bytes: int
    shard_bytes: int
    fingerprint: str
    left_out: dict[str, int]
    formats: dict[str, int]
    spreads: dict[str, Spread]
    captions: dict[str, int]
    noted: dict[str, int]
    labelled: int
    classes: int
    empty_classes: int
    largest: tuple[tuple[int, int], ...]
    smallest: tuple[tuple[int, int], ...]
    duplicates: Duplicates
    order: dict[str, Any]
    advice: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Returns the statistics for JSON, with percentiles by number."""
        spreads = {
            name: {"unit": spread.unit, "mean": spread.mean, **dict(zip(map(str, PERCENTILES), spread.percentiles, strict=True))}
            for name, spread in self.spreads.items()
        }
        return {**asdict(self), "spreads": spreads}

    def text(self) -> str:
        """Returns the statistics as text."""
        lines = [
            f"{self.samples:,} samples in {self.shards:,} shards",
            f"bytes        {_bytes(self.shard_bytes)} of shards, {_bytes(self.image_bytes)} of images",
            f"fingerprint {self.fingerprint}",
            f"formats      {_counted(self.formats)}",
            f"captions     {_counted(self.captions)}",
        ]
        if self.labelled:
            empty = f", {self.empty_classes:,} of them empty" if self.empty_classes else ""
            lines.append(f"labels       {self.labelled:,} samples in {self.classes:,} classes{empty}")
            lines.append(f"  largest    {', '.join(f'{number}: {n:,}' for number, n in self.largest)}")
            lines.append(f"  smallest   {', '.join(f'{number}: {n:,}' for number, n in self.smallest)}")
        else:
            lines.append("labels       none")
        if self.noted:
            lines.append(f"noted        {', '.join(f'{name} {n:,}' for name, n in self.noted.items())}")
        if self.left_out:
            lines.append(f"left out     {_counted(self.left_out)}")
        if self.duplicates.pictures:
            twice = self.duplicates
            differ = f"; {twice.labels_differ:,} with several classes" if twice.labels_differ else ""
            lines.append(f"duplicates   {twice.pictures:,} images occur {twice.superfluous:,} times too often{differ}")
            lines += ["  " + "  =  ".join(printable(f"{shard} {key}") for shard, key in places) for places in twice.examples]
        else:
            lines.append("duplicates   none")
        heads = ("min", *(f"{p} %" for p in PERCENTILES[1:-1]), "max", "mean")
        lines += ["", f"{'':22}" + "".join(f"{head:>10}" for head in heads)]
        for name, spread in self.spreads.items():
            values = "".join(f"{_number(value):>10}" for value in (*spread.percentiles, spread.mean))
            lines.append(f"{name + (f', {spread.unit}' if spread.unit else ''):22}{values}")
        lines.append("")
        if "ranks" in self.order:
            o = self.order
            lines.append(
                f"with a global batch of {o['global_batch']}: {o['streams']} streams, {o['steps_per_epoch']:,} steps an epoch, "
                f"{o['left_over']:,} samples left over each time; ranks: {', '.join(map(str, o['ranks']))}"
            )
        lines += [f"- {sentence}" for sentence in self.advice]
        return shown("\n".join(lines))


def statistics(manifest: Manifest, *, global_batch: int = 1024) -> Statistics:
    """Computes the statistics of an index, shard by shard.

    Memory: about 0.5 GB, and 16 bytes per class. A quantity with more than a million distinct values is rounded to 12 binary
    digits (0.05 %), or as few as are necessary. Duplicates among more than four million samples need 20 bytes of disk per sample
    in the index directory.

    Args:
        manifest: the index.
        global_batch: for recommendations on order and world size.

    Raises:
        DataError: a sidecar is missing or damaged.
        OSError: the disk is full.
    """
    sides, images, captions, labels = Tally(rounded_pairs), Tally(), Tally(), Tally(None)
    formats, sources = (np.zeros(len(names), np.int64) for names in (FORMATS, CAPTION_SOURCES))
    image_bytes = 0

    def columns() -> Iterator[dict[str, NDArray[Any]]]:
        nonlocal image_bytes
        names = ("width", "height", "image_size", "format", "caption_source", "caption_size", "label", "crc32")
        for number in range(len(manifest.shards)):
            own = {name: manifest.column(number, name) for name in names}
            sides.add(pairs(own["width"].astype(np.int64), own["height"].astype(np.int64)))
            images.add(own["image_size"])
            captions.add(own["caption_size"][own["caption_source"] == CAPTION_SOURCES.index("text")])
            labels.add(own["label"][own["label"] >= 0])
            np.add.at(formats, own["format"], 1)
            np.add.at(sources, own["caption_source"], 1)
            image_bytes += int(own["image_size"].sum(dtype=np.int64))
            yield own

    groups = duplicates.find(columns(), manifest.total, Path(manifest.directory))
    numbers, occurrences = labels.result()
    ranked = sorted(zip(occurrences.tolist(), numbers.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
    sizes = manifest.shards.sizes
    order, copies = _order(manifest, global_batch), _duplicates(manifest, groups)
    return Statistics(
        shards=len(manifest.shards),
        samples=manifest.total,
        image_bytes=image_bytes,
        shard_bytes=int(sizes.sum()),
        fingerprint=manifest.fingerprint,
        left_out={status: n for status, n in manifest.counts.items() if status != "ok"},
        formats=_named(FORMATS, formats),
        spreads=_spreads(manifest, sides, images, captions),
        captions=_named(CAPTION_SOURCES, sources),
        noted=manifest.notes,
        labelled=int(occurrences.sum()),
        classes=manifest.classes,
        empty_classes=manifest.classes - len(numbers),
        largest=tuple((number, n) for n, number in ranked[:_TOP]),
        smallest=tuple((number, n) for n, number in ranked[::-1][:_TOP]),
        duplicates=copies,
        order=order,
        advice=tuple(_advice(manifest, sizes, copies, order)),
    )


def _spreads(manifest: Manifest, sides: Tally, images: Tally, captions: Tally) -> dict[str, Spread]:
    both, times = sides.result()
    width, height = (both >> 32).astype(np.float64), (both & 0xFFFFFFFF).astype(np.float64)
    ones = np.ones(len(manifest.shards), np.int64)
    of_images, of_captions = images.result(), captions.result()
    measured: tuple[tuple[str, str, NDArray[Any], NDArray[np.int64]], ...] = (
        ("width", "px", width, times),
        ("height", "px", height, times),
        ("aspect", "w/h", width / height, times),
        ("area", "Mpx", width * height / 1e6, times),
        ("picture", "kB", of_images[0] / 1e3, of_images[1]),
        ("caption", "bytes", of_captions[0].astype(np.float64), of_captions[1]),
        ("shard", "MB", manifest.shards.sizes / 1e6, ones),
        ("samples a shard", "", manifest.sizes.astype(np.float64), ones),
    )
    return {
        name: Spread(unit, float((values * counts).sum() / counts.sum()), tuple(percentiles(values, counts, PERCENTILES)))
        for name, unit, values, counts in measured
        if len(values)
    }


def _named(names: Sequence[str], counts: NDArray[np.int64]) -> dict[str, int]:
    return {name: n for name, n in sorted(zip(names, counts.tolist(), strict=True), key=lambda pair: -pair[1]) if n}


def _duplicates(manifest: Manifest, groups: duplicates.Groups) -> Duplicates:
    ends = np.cumsum(manifest.sizes)

    def folder_and_label(row: int) -> tuple[str, str]:
        shard = int(np.searchsorted(ends, row, side="right"))
        return manifest.shards[shard].name, manifest.rows(shard).keys[row - int(ends[shard]) + manifest.shards[shard].samples]

    places = tuple(tuple(folder_and_label(row) for row in rows) for rows in groups.examples)
    return Duplicates(groups.count, groups.superfluous, groups.labels_differ, places)


def _order(manifest: Manifest, global_batch: int) -> dict[str, Any]:
    try:
        streams = default_streams(global_batch, extents_of(manifest.sizes, manifest.shards.sizes, ()), BLOCK_SIZE)
        order = Order(manifest.sizes, 0, global_batch, streams, BLOCK_SIZE)
    except FoveaError:
        return {"global_batch": global_batch}
    return {
        "global_batch": global_batch,
        "streams": order.streams,
        "steps_per_epoch": order.steps_per_epoch,
        "samples_per_epoch": order.samples_per_epoch,
        "left_over": manifest.total - order.samples_per_epoch,
        "ranks": divisors(global_batch),
    }


def _advice(manifest: Manifest, sizes: NDArray[Any], duplicates: Duplicates, order: dict[str, Any]) -> list[str]:
    out = []
    middle, count = float(np.median(sizes)), len(sizes)
    pack = "`fovea shards pack SHARDS OUT` repacks them at 200 to 500 MB"
    if middle < SMALL_SHARD and count > 1 and sizes.sum() > 2 * SMALL_SHARD:
        out.append(f"shards of {_bytes(middle)} are small: on object storage each costs a request and a wait; {pack}")
    if middle > LARGE_SHARD:
        out.append(f"shards of {_bytes(middle)} are large: a node must hold several of them at a time; {pack}")
    if count > 3 and sizes[:-1].min() * 4 < middle:
        out.append(f"the smallest shard has {_bytes(float(sizes.min()))}, the middle one {_bytes(middle)}: sizes are uneven")
    empty = int((manifest.shards.samples == 0).sum())
    if empty:
        out.append(f"{empty} shards hold no sample that can be used; leave them out")
    if "streams" not in order:
        out.append(f"{manifest.total:,} samples do not make one global batch of {order['global_batch']}")
    else:
        if count < 8:
            few = f"with {count} shard{'s' if count > 1 else ''} each node reads nearly all of them"
            out.append(f"{few}: more shards than nodes are better")
        if order["streams"] < min(256, 2 ** int(math.log2(order["global_batch"]))):
            out.append(f"a global batch of {order['global_batch']} allows {order['streams']} streams only: choose a power of two")
    if duplicates.labels_differ:
        out.append(f"{duplicates.labels_differ:,} images have several labels: the classes disagree")
    if duplicates.superfluous * 100 > manifest.total:
        out.append(f"{100 * duplicates.superfluous / manifest.total:.1f} % of the samples are copies of others")
    replaced = manifest.notes.get(REPLACED, 0)
    if replaced:
        out.append(f"{replaced:,} captions are not UTF-8: invalid bytes are replaced by U+FFFD; convert them to UTF-8")
    left_out = sum(n for status, n in manifest.counts.items() if status != "ok")
    if left_out * 100 > manifest.total:
        out.append(f"{left_out:,} samples cannot be used: see `fovea shards index`")
    return out


def _counted(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {n:,} ({100 * n / total:.3g} %)" for name, n in Counter(counts).most_common())


def _bytes(value: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.3g}"
