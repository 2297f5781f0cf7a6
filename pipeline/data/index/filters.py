"""Narrows an existing index to samples with certain parts, such as a caption, without reading shards again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.data.index.manifest import Manifest
from pipeline.data.index.shard_table import Shard, ShardTable
from pipeline.errors import DataError


def narrow(
    manifest: Manifest,
    directory: str | Path,
    require: tuple[str, ...],
    progress: Callable[[int, int, Shard], None] | None = None,
) -> Manifest:
    """Returns the same shards without the samples that lack a part. Only a manifest is written; sidecars are shared.

    Equal to an index built with ``Fields(require=…)``, but derived from the columns of one built without.

    Args:
        manifest: an index whose rules require nothing.
        directory: directory of the narrower index; one that was derived from the same index is reused.
        require: of ``caption``, ``label`` and ``segmentation``.
        progress: called after each shard that was read with (shards done, total shards, summary).

    Raises:
        DataError: no sample is left, or a sidecar is missing.
    """
    fields, folder = replace(manifest.fields, require=require), Path(directory)
    with contextlib.suppress(DataError):
        known = Manifest.load(folder)
        if (known.fields, known.parent, known.sidecars) == (fields, manifest.shards.version, manifest.sidecars):
            return known
    shards = []
    for number in range(len(manifest.shards)):
        stored = manifest.index(number)
        shards.append(Shard.of(stored.requiring(require), stored.sidecar))
        if progress is not None:
            progress(number + 1, len(manifest.shards), shards[-1])
    table = ShardTable.of(shards, manifest.fields)
    narrower = Manifest(str(folder), table, fields, manifest.sidecars, manifest.shards.version)
    if narrower.total == 0:
        counted = ", ".join(f"{n} {status}" for status, n in narrower.counts.items())
        raise DataError(
            f"no sample can be used: {counted}",
            where=f"{shards[0].url}{' …' if len(shards) > 1 else ''}",
            hint=f"Give each image a {' and a '.join(require)}: the method needs it",
        )
    return narrower.save(folder)
