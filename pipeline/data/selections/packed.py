"""Narrows the samples of shards that are packed again to those of selections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.data.index.manifest import Manifest
from pipeline.data.index.selected import UNIT
from pipeline.data.pack.members import Members, digest_of
from pipeline.data.selections.apply import Chosen, select
from pipeline.data.selections.file import Selection


def selected_members(source: Members, manifest: Manifest, files: Sequence[Path]) -> Members:
    """Returns the samples that all selections have; each once, whatever its weight.

    The members of the others are left out with the reason ``unselected``.

    Args:
        source: samples of shards, or of a part of the shards.
        manifest: the index of all shards.
        files: the selections.

    Raises:
        DataError: a selection belongs to other shards or is damaged, or no sample is left.
    """
    narrowed = select(manifest, [Chosen(0, len(manifest.shards), tuple(files), "--selection")])
    own = {part.about.url for parts in source.parts for part in parts.values()}
    chosen: set[tuple[str, int]] = set()
    other_weights = 0
    for number in range(len(narrowed.shards)):
        url = narrowed.shards[number].url
        if url not in own:
            continue
        chosen.update((url, int(offset)) for offset in narrowed.column(number, "image_offset"))
        other_weights += int(np.count_nonzero(narrowed.selected.units(number) != UNIT))
    kept, left_out = [], list(source.left_out)
    for position, parts in enumerate(source.parts):
        if any((part.about.url, part.offset) in chosen for part in parts.values()):
            kept.append(position)
        else:
            left_out += [(f"{source.names[position]}.{extension}", "unselected") for extension in parts]
    remarks = list(source.remarks)
    if other_weights:
        remarks.append(f"{other_weights} samples have a weight other than 1, which shards cannot hold: each is packed once")
    names = {source.names[position] for position in kept}
    return replace(
        source,
        keys=[source.keys[position] for position in kept],
        parts=[source.parts[position] for position in kept],
        names=[source.names[position] for position in kept],
        digest=digest_of("selected", [source.digest, *(Selection(file).info.sha256 for file in files)]),
        left_out=sorted(left_out),
        notes=[(name, note) for name, note in source.notes if name in names],
        remarks=remarks,
    )
