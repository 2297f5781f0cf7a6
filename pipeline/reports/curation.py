"""Page of a curation command: examples of duplicates or of retrieved images, clusters, and the classes before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import storage
from pipeline.data.curation.outcome import Outcome, Pair
from pipeline.data.curation.vectors import Vectors
from pipeline.data.formats.composite import composite
from pipeline.data.index.manifest import Manifest
from pipeline.data.selections.file import SelectionInfo
from pipeline.data.settings import StorageSettings
from pipeline.reports import images, page
from pipeline.reports.figures import Chart, Line
from pipeline.untrusted import printable

_SIDE = 128
_CLUSTERS, _ENDS = 24, 3
_GRAY = 128


@dataclass(frozen=True)
class Cell:
    """One image of the page."""

    image: Image.Image
    name: str


def write(
    out: Path,
    command: str,
    info: SelectionInfo,
    outcome: Outcome,
    vectors: Vectors,
    others: Sequence[Vectors] = (),
    *,
    manifests: Mapping[str, Manifest],
    pair_title: str = "",
) -> None:
    """Writes the page.

    Args:
        out: the HTML file.
        command: that made the selection.
        info: what the selection says about itself.
        outcome: examples, clusters, weights.
        vectors: the samples.
        others: the sets that pairs may be of.
        manifests: indexes of the shards by their fingerprints; images of other sets are gray.
        pair_title: heading of the pairs.

    Raises:
        DataError: the shards are missing, or the page cannot be written.
    """
    sheets = [_Sheet(one, manifests.get(one.embeddings.fingerprint)) for one in (vectors, *others)]
    shown: list[set[int]] = [set() for _ in sheets]
    clusters = _clusters(outcome)
    for pair in outcome.pairs:
        shown[0].add(pair.a)
        shown[pair.other + 1].add(pair.b)
    shown[0].update(position for _, _, positions in clusters for position in positions)
    cells = [sheet.cells(sorted(positions)) for sheet, positions in zip(sheets, shown, strict=True)]
    page.write(
        out,
        "curation",
        title=f"fovea: {command}",
        command=command,
        info=info,
        notes=outcome.notes,
        charts=_charts(outcome, vectors),
        pairs=[_pair(pair, cells) for pair in outcome.pairs],
        pair_title=pair_title,
        clusters=[
            {"title": title, "note": note, "cells": [cells[0][position] for position in positions]}
            for title, note, positions in clusters
        ],
        width=_SIDE,
    )


def _pair(pair: Pair, cells: Sequence[dict[int, Cell]]) -> dict[str, Any]:
    state = "kept" if pair.kept else "left out"
    return {"a": cells[0][pair.a], "b": cells[pair.other + 1][pair.b], "title": f"cosine {pair.cosine:.3f}, first {state}"}


def _clusters(outcome: Outcome) -> list[tuple[str, str, list[int]]]:
    """Title, note and positions of some clusters, by size."""
    if outcome.clusters is None or outcome.cosines is None:
        return []
    sizes = np.bincount(outcome.clusters)
    order = np.flatnonzero(sizes)[np.argsort(-sizes[sizes > 0], kind="stable")]
    shown = order if len(order) <= _CLUSTERS else order[np.linspace(0, len(order) - 1, _CLUSTERS).round().astype(int)]
    kept = np.bincount(outcome.clusters, weights=outcome.weights, minlength=len(sizes))
    rows = []
    for cluster in shown.tolist():
        members = np.flatnonzero(outcome.clusters == cluster)
        ranked = members[np.argsort(-outcome.cosines[members], kind="stable")]
        ends = list(dict.fromkeys([*ranked[:_ENDS].tolist(), *ranked[-_ENDS:].tolist()]))
        rows.append((f"cluster {cluster}", f"{sizes[cluster]} samples, {kept[cluster]:.1f} in an epoch", ends))
    return rows


def _charts(outcome: Outcome, vectors: Vectors) -> list[Chart]:
    labels = vectors.column("label")
    known = labels >= 0
    if not known.any():
        return []
    names, classes = np.unique(labels[known], return_inverse=True)
    before = np.bincount(classes)
    after = np.bincount(classes, weights=outcome.weights[known], minlength=len(names))
    order = np.argsort(-before, kind="stable")
    lines = [
        Line(name, [(float(rank), float(values[number])) for rank, number in enumerate(order)], dots=len(names) < 40)
        for name, values in (("before", before), ("in an epoch", after))
    ]
    return [Chart("samples of each class, the largest first", lines)]


class _Sheet:
    """Images of an embedded set, by position."""

    def __init__(self, vectors: Vectors, manifest: Manifest | None) -> None:
        self._vectors, self._manifest = vectors, manifest

    def cells(self, positions: Iterable[int]) -> dict[int, Cell]:
        """Returns images, gray where one cannot be decoded."""
        from pipeline.data.augment.decode import decoder_of
        from pipeline.data.loader.reader import Reader

        chosen = np.array(list(positions), dtype=np.int64)
        if not len(chosen):
            return {}
        if self._manifest is None:
            unknown = images.fitted(np.full((_SIDE, _SIDE, 3), _GRAY, np.uint8), _SIDE)
            return {position: Cell(unknown, "not shown: --shards does not name its shards") for position in chosen.tolist()}
        near = storage.Storage(StorageSettings(access="range_read", outage_timeout=20.0))
        records = Reader(self._manifest, wants=("image", "label"), store=near).fetch(self._numbers(chosen))
        decoder, cells = decoder_of(self._manifest.fields), {}
        declared = self._vectors.embeddings.spec.image.channels
        for position, record in zip(chosen.tolist(), records, strict=True):
            pixels = decoder.decode([record.image])[0] if record.image is not None else None
            if pixels is None:
                pixels = np.full((_SIDE, _SIDE, 3), _GRAY, np.uint8)
            elif declared is not None:
                pixels = composite(pixels, declared.composite)
            name = f"{record.key} of {record.shard_name}, {record.width} x {record.height}"
            cells[position] = Cell(
                images.fitted(pixels, _SIDE, sharp=True),
                printable(name + (f", class {record.label}" if record.label >= 0 else "")),
            )
        return cells

    def _numbers(self, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
        shards = np.searchsorted(self._vectors.ends, positions, side="right")
        numbers = np.empty(len(positions), dtype=np.uint64)
        for shard in np.unique(shards).tolist():
            rows = self._vectors.embeddings.read(shard, ("row",))["row"]
            own = shards == shard
            numbers[own] = (np.uint64(shard) << np.uint64(32)) | rows[positions[own] - self._vectors.first(shard)].astype(
                np.uint64
            )
        return numbers
