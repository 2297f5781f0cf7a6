"""Rejects overlap between training and evaluation data: by file, by the content of whole shards, and sample by sample.

Two shards are the same if they are the same file (path, symbolic link, hard link), have the same URL, or hold the same samples in
the same places (size and digest of the index), whatever their names. Two samples are the same if size and CRC-32 of the image
are equal.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Hashable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data import storage
from pipeline.data.index.manifest import Manifest
from pipeline.data.index.shard_table import Shard
from pipeline.errors import DataError
from pipeline.untrusted import hide_secrets, printable, read_json

_NAMED = 3
_MOST = 20_000_000  # number of training samples above which single samples are not compared
_TOLERATED = 0.01  # fraction of the evaluated samples: public data sets contain a few duplicates


def check_held_out(learned: Manifest, evaluated: Manifest, *, where: str, hint: str, learning: str = "learned from") -> None:
    """Rejects evaluation samples that are also training samples. A few single duplicates are only reported on stderr.

    Args:
        learned: index of the samples that vote, train a probe, or trained the network.
        evaluated: index of the evaluated samples.
        where: setting that names the latter.
        hint: how to fix it.
        learning: how the former are used, for the message.

    Raises:
        DataError: a shard is in both, or more than 1 % of the evaluated samples are.
    """
    owner: dict[Hashable, Shard] = {}
    for shard in learned.shards:
        for name in _names(shard):
            owner.setdefault(name, shard)
    shared = [(shard, owner[name]) for shard in evaluated.shards if (name := _known(shard, owner)) is not None]
    if shared:
        named = ", ".join(_pair(*pair) for pair in shared[:_NAMED]) + (" …" if len(shared) > _NAMED else "")
        raise DataError(
            f"{len(shared)} of {len(evaluated.shards)} evaluated shards are also {learning}: {named}", where=where, hint=hint
        )
    twice = _twice(learned, evaluated)
    if twice > _TOLERATED * evaluated.total:
        raise DataError(f"{twice} of {evaluated.total} evaluated samples are also {learning}", where=where, hint=hint)
    if twice:
        report(f"{where}: {twice} of {evaluated.total} evaluated samples are also {learning} (the same bytes in other shards)")


def report(text: str) -> None:
    """Prints one line on stderr, from one rank only."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0" and "FOVEA_KEY" not in os.environ:  # the launcher has already checked the data and reports for its ranks
        print(f"fovea: {text}", file=sys.stderr, flush=True)


def _names(shard: Shard) -> list[Hashable]:
    """Returns everything that identifies a shard."""
    names: list[Hashable] = [storage.absolute(shard.url)]
    if shard.samples:
        names.append((shard.size, shard.digest))
    if not storage.is_remote(shard.url):
        path = storage.local_path(shard.url)
        names.append(os.path.realpath(path))
        try:
            about = os.stat(path)
            names.append((about.st_dev, about.st_ino, "inode"))
        except OSError:
            pass
    return names


def _known(shard: Shard, owner: dict[Hashable, Shard]) -> Hashable | None:
    return next((name for name in _names(shard) if name in owner), None)


def _pair(shard: Shard, other: Shard) -> str:
    shown, also = (printable(hide_secrets(one.url)) for one in (shard, other))
    return shown if shown == also else f"{shown} (as {also})"


def _twice(learned: Manifest, evaluated: Manifest) -> int:
    """Counts the evaluated samples that are also training samples; cached beside the index, since every rank calls this."""
    if not evaluated.total or learned.total > _MOST:
        return 0
    kept = Path(evaluated.directory) / f"shared-with-{learned.fingerprint[:16]}.json"
    try:
        document = read_json(kept, limit=1 << 16)
        if document["evaluated"] == evaluated.fingerprint:
            return int(document["samples"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, DataError):
        pass
    ours = [_samples(evaluated, number) for number in range(len(evaluated.shards))]
    digests = np.unique(np.concatenate(ours))
    seen = np.zeros(len(digests), dtype=bool)
    for number in range(len(learned.shards)):
        seen |= np.isin(digests, _samples(learned, number))
    among = digests[seen]
    twice = int(sum(np.isin(one, among).sum() for one in ours))
    with contextlib.suppress(OSError):  # not cached: counted again next time
        storage.write_atomically(kept, json.dumps({"evaluated": evaluated.fingerprint, "samples": twice}).encode())
    return twice


def _samples(manifest: Manifest, number: int) -> NDArray[np.uint64]:
    crc, size = (manifest.column(number, name).astype(np.uint64) for name in ("crc32", "image_size"))
    return (crc << np.uint64(32)) | (size & np.uint64(0xFFFFFFFF))
