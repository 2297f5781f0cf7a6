"""Writes generated data sets as shards, once: a stamp beside them says what they are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.pack.shard_writer import ShardWriter

_VALIDATION = 1 << 40  # indexes of validation samples begin here


def write_generated(
    directory: str | Path,
    name: str,
    sample: Callable[[int], dict[str, Any]],
    about: dict[str, Any],
    *,
    train: int,
    val: int,
    samples_per_shard: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes ``NAME-train-00000.tar``… and ``NAME-val-00000.tar``…, unless the stamp says that the same are there already.

    Args:
        directory: output directory.
        name: prefix of the shards.
        sample: makes the members of the sample with an index, without its key.
        about: what the samples depend on, as JSON; the content of the stamp.
        train, val: number of training and of validation samples; their indexes are disjoint.
        samples_per_shard: samples per shard.
        progress: called with (samples done, total samples).

    Returns:
        Paths of all shards, training first.
    """
    folder = Path(directory)
    stamp = folder / f"{name}.json"
    written = _already(stamp, about)
    if written is not None:
        return written
    stamp.unlink(missing_ok=True)
    for old in folder.glob(f"{name}-*-[0-9]*.tar"):
        old.unlink()
    shards: list[str] = []
    done = 0
    for part, first, count in (("train", 0, train), ("val", _VALIDATION, val)):
        with ShardWriter(folder, f"{name}-{part}", samples_per_shard=samples_per_shard) as writer:
            for number in range(count):
                writer.write({"__key__": f"{part}_{number:07d}", **sample(first + number)})
                done += 1
                if progress is not None:
                    progress(done, train + val)
        shards += writer.shards
    document = {**about, "shards": [[Path(shard).name, Path(shard).stat().st_size] for shard in shards]}
    stamp.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return shards


def _already(stamp: Path, expected: dict[str, Any]) -> list[str] | None:
    try:
        document = json.loads(stamp.read_text(encoding="utf-8"))
        shards = [(stamp.parent / name, size) for name, size in document.pop("shards")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    same = document == expected and all(path.is_file() and path.stat().st_size == size for path, size in shards)
    return [str(path) for path, _ in shards] if same else None
