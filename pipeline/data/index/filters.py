"""Narrows an existing index to samples with certain parts, such as a caption, without reading shards again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.data.index.manifest import STATUSES, Manifest, Shard, ShardIndex, load_sidecar
from pipeline.errors import DataError


def narrow(manifest: Manifest, directory: str | Path, require: tuple[str, ...]) -> Manifest:
    """Returns the same shards without the samples that lack a part; sidecars and manifest are written to another directory.

    Equal to an index built with ``Fields(require=…)``, but derived from the columns of one built without.

    Args:
        manifest: an index whose rules require nothing.
        directory: directory of the narrower index; up-to-date files there are kept.
        require: of ``caption``, ``label`` and ``segmentation``.

    Raises:
        DataError: no sample is left, or a sidecar is missing.
    """
    fields, folder, shards = replace(manifest.fields, require=require), Path(directory), []
    for shard in manifest.shards:
        index = _without(load_sidecar(Path(manifest.directory) / shard.sidecar), require)
        index = replace(index, fields=fields)
        narrowed = Shard.of(index)
        if not _there(folder / narrowed.sidecar, index):
            index.save(folder / narrowed.sidecar)
        shards.append(narrowed)
    narrower = Manifest(str(folder), tuple(shards), fields)
    if narrower.total == 0:
        counted = ", ".join(f"{n} {status}" for status, n in narrower.counts.items())
        raise DataError(
            f"no sample can be used: {counted}",
            where=f"{shards[0].url}{' …' if len(shards) > 1 else ''}",
            hint=f"Give each image a {' and a '.join(require)}: the method needs it",
        )
    narrower.save(folder)
    return narrower


def _without(index: ShardIndex, require: tuple[str, ...]) -> ShardIndex:
    columns = index.columns
    lacks = {
        "caption": columns["caption_source"] == 0,
        "label": columns["label"] < 0,
        "segmentation": columns["segmentation_size"] == 0,
    }
    status = columns["status"].copy()
    for name in require:
        status[(status == 0) & lacks[name]] = STATUSES.index(f"missing_{name}")
    return replace(index, columns={**columns, "status": status.astype(np.uint8)})


def _there(path: Path, index: ShardIndex) -> bool:
    try:
        known = load_sidecar(path)
    except DataError:
        return False
    same = (known.url, known.size, known.tag, known.fields) == (index.url, index.size, index.tag, index.fields)
    return same and known.digest == index.digest
