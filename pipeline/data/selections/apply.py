"""Narrows an index to the samples of selections, without reading shards; left-out samples have the status ``unselected``."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index.manifest import Manifest
from pipeline.data.index.selected import MAX_WEIGHT, UNIT, save_selected
from pipeline.data.index.shard_table import Shard, ShardTable
from pipeline.data.order.order import Source
from pipeline.data.order.weighted import SampleWeights
from pipeline.data.selections.file import Part, Selection
from pipeline.errors import DataError


@dataclass(frozen=True)
class Chosen:
    """The selections of one data set.

    Attributes:
        first: index of its first shard.
        shards: number of its shards.
        files: a sample is used if all of them select it; its weights are multiplied. Empty: all samples, once.
        name: the setting that names them, for messages.
    """

    first: int
    shards: int
    files: tuple[Path, ...]
    name: str = "data.selection"


def select(manifest: Manifest, chosen: Sequence[Chosen], require: tuple[str, ...] = (), *, verify: bool = True) -> Manifest:
    """Returns the same shards with only the samples that selections name and that have certain parts.

    The rows are numbered from 0 again; which rows of the index they are, and their weights, lie beside the manifest.

    Args:
        manifest: an index whose rules require nothing.
        chosen: the selections of each data set, in the order of their shards, without gaps.
        require: of ``caption``, ``label`` and ``segmentation``.
        verify: compare the files with their checksums also where their rows are beside the index already; if not, another
            process has done so.

    Raises:
        DataError: a selection belongs to other data or is damaged, or no sample is left.
    """
    opened = [[Selection(path) for path in one.files] for one in chosen]
    for one, selections in zip(chosen, opened, strict=True):
        _check_data(manifest, one, selections)
    parts = [[one.first, one.shards, [s.info.sha256 for s in selections]] for one, selections in zip(chosen, opened, strict=True)]
    digest = hashlib.sha256(json.dumps([manifest.shards.version, parts, require]).encode()).hexdigest()[:32]
    fields, folder = replace(manifest.fields, require=require), Path(manifest.directory) / f"select-{digest[:16]}"
    reused: Manifest | None = None
    with contextlib.suppress(DataError):
        known = Manifest.load(folder)
        if (known.fields, known.parent, known.selection) == (fields, manifest.shards.version, digest):
            known.selected.rows(0)
            reused = known
    if reused is not None:
        for selection in itertools.chain.from_iterable(opened) if verify else ():
            selection.verify()
        return reused
    shards: list[Shard] = []
    kept: list[tuple[NDArray[np.uint32], NDArray[np.uint32]]] = []
    for one, selections in zip(chosen, opened, strict=True):
        for number, rows, units in _merged(manifest, one, selections):
            stored = manifest.index(number)
            required = stored.requiring(require)
            usable = required.columns["status"][stored.accepted[rows]] == 0
            rows, units = rows[usable], units[usable]
            kept.append((rows.astype(np.uint32), units.astype(np.uint32)))
            shards.append(Shard.of(required.choosing(stored.accepted[rows]), stored.sidecar))
    table = ShardTable.of(shards, manifest.fields)
    narrower = Manifest(str(folder), table, fields, manifest.sidecars, manifest.shards.version, digest)
    if narrower.total == 0:
        counted = ", ".join(f"{n} {status}" for status, n in narrower.counts.items())
        raise DataError(
            f"no sample can be used: {counted}", where=chosen[0].name, hint="Use selections that have samples in common"
        )
    save_selected(narrower.selected_file, kept)
    return narrower.save(folder)


def weights_of(manifest: Manifest, sources: Sequence[Source] = ()) -> dict[int, SampleWeights]:
    """Returns the weights of the data sets in which not every sample has weight 1, by the number of the data set."""
    if not manifest.selection:
        return {}
    ranges = [(source.first, source.shards) for source in sources] or [(0, len(manifest.shards))]
    weights = {number: manifest.selected.weights(*part) for number, part in enumerate(ranges)}
    return {number: one for number, one in weights.items() if one is not None}


def selection_identity(manifest: Manifest) -> str | None:
    """Returns a hash of the weights of the samples; ``None`` if each has weight 1, as the fingerprint covers which they are."""
    return manifest.selected.weights_digest if manifest.selection else None


def _check_data(manifest: Manifest, one: Chosen, selections: Sequence[Selection]) -> None:
    if not selections:
        return
    part = manifest
    if (one.first, one.shards) != (0, len(manifest.shards)):
        own = manifest.shards[one.first : one.first + one.shards]
        part = Manifest(manifest.directory, ShardTable.of(own, manifest.fields), manifest.fields, manifest.sidecars)
    for selection in selections:
        if (selection.info.fingerprint, selection.info.total) != (part.fingerprint, part.total):
            raise DataError(
                f"the selection belongs to other data: an index of {selection.info.total} samples with fingerprint "
                f"{selection.info.fingerprint[:12]}, not {part.total} with {part.fingerprint[:12]}",
                where=f"{one.name}: {selection.path}",
                hint="Use the shards and the rules of the index that it was made from, or make it again",
            )


def _merged(
    manifest: Manifest, one: Chosen, selections: Sequence[Selection]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Yields each shard of a data set with the rows that all its selections have, and their weights in units of 1/65536."""
    streams = [_every_shard(selection, one) for selection in selections]
    for number in range(one.first, one.first + one.shards):
        size = int(manifest.sizes[number])
        rows, units = np.arange(size), np.full(size, UNIT, dtype=np.int64)
        for stream, selection in zip(streams, selections, strict=True):
            part = next(stream)
            if len(part.rows) and int(part.rows[-1]) >= size:
                raise DataError(
                    f"row {int(part.rows[-1])} of shard {part.shard} does not exist: it has {size} samples",
                    where=str(selection.path),
                    hint="Make the selection again",
                )
            rows, ours, theirs = np.intersect1d(rows, part.rows, assume_unique=True, return_indices=True)
            units = units[ours] * part.units[theirs].astype(np.int64) // UNIT
            units = np.clip(units, 1, int(MAX_WEIGHT * UNIT))
        yield number, rows, units
    for stream in streams:
        next(stream, None)  # verifies the checksum


def _every_shard(selection: Selection, one: Chosen) -> Iterator[Part]:
    """Yields the part of each shard of a data set, empty if nothing of it is selected."""
    expected = 0
    nothing = np.empty(0, dtype=np.int64)
    for part in selection.parts():
        if part.shard >= one.shards:
            raise DataError(
                f"shard {part.shard} does not exist: there are {one.shards}",
                where=str(selection.path),
                hint="Make the selection again",
            )
        yield from (Part(number, nothing, nothing.astype(float)) for number in range(expected, part.shard))
        yield part
        expected = part.shard + 1
    yield from (Part(number, nothing, nothing.astype(float)) for number in range(expected, one.shards))
