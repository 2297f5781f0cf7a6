"""Compares a checkpoint's data with the current data; refuses to resume on changed data and reports the changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.checkpoint.files import Saved
from pipeline.data.index.manifest import Manifest
from pipeline.data.index.shard_table import FILE, Shard
from pipeline.data.inputs import Inputs, data_identity
from pipeline.errors import CheckpointError, DataError
from pipeline.untrusted import plain_name

_ACCEPTABLE = {
    "fingerprint",
    "sources",
    "selection",
}  # changes that checkpoint.allow_data_change permits; all others are settings that can be restored
_NAMED = 5


def record_data(folder: Path, inputs: Inputs) -> None:
    """Saves the manifest of a run's training data, so that a later attempt can report what has changed.

    Args:
        folder: the run's folder for it, see :meth:`pipeline.runtime.run_directory.RunDirectory.data`.
        inputs: the data sets.
    """
    target = folder / inputs.train.fingerprint
    if not (target / FILE).exists():
        target.mkdir(parents=True, exist_ok=True)
        inputs.train.save(target)


def check_data(saved: Saved, inputs: Inputs, *, allow: bool = False) -> str:
    """Refuses to resume on other data or in another order.

    Args:
        saved: the checkpoint.
        inputs: the current data sets.
        allow: accept other shards and other mixing weights. The step number stays; the order is the new data's.

    Returns:
        Empty if nothing has changed, else a description of the accepted changes.

    Raises:
        CheckpointError: the data differ; the message names the checkpoint's data and the current shards.
    """
    data, now = saved.manifest.get("data") or {}, data_identity(inputs)
    changed = [name for name, value in now.items() if data.get(name) != value]
    if not changed:
        return ""
    differences = "; ".join(f"{name} was {data.get(name)!r} and is {now[name]!r}" for name in changed)
    if "fingerprint" in changed:
        differences += f"; {_difference(saved, inputs.train)}"
    acceptable = set(changed) <= _ACCEPTABLE
    if allow and acceptable:
        return (
            f"{saved.path}: continues at step {saved.step} over other data, as checkpoint.allow_data_change says ({differences})"
        )
    samples_then = data.get("samples", "unknown")
    consent = "; or checkpoint.allow_data_change=true continues at the same step over the new data" if acceptable else ""
    raise CheckpointError(
        f"the data of this run have changed ({differences})",
        where=str(saved.path),
        hint=f"Resume over the {samples_then} samples it was trained on, or start a new run in another run.directory{consent}",
    )


def _difference(saved: Saved, now: Manifest) -> str:
    """Removed, new and changed shards since a checkpoint, with counts."""
    data = saved.manifest.get("data") or {}
    try:
        fingerprint = plain_name(data.get("fingerprint"), where=str(saved.path))
        old = Manifest.load(saved.path.parent.parent / "data" / fingerprint)
    except DataError:
        return f"{data.get('samples', 'unknown')} samples then, {now.total} in {len(now.shards)} shards now"
    old_shards, new_shards = _by_name(old), _by_name(now)
    parts = [f"{old.total} samples in {len(old.shards)} shards then, {now.total} in {len(now.shards)} now"]
    gone = [f"{shard.name} ({shard.samples})" for key, shard in old_shards.items() if key not in new_shards]
    new = [f"{shard.name} ({shard.samples})" for key, shard in new_shards.items() if key not in old_shards]
    both = [(old_shards[key], new_shards[key]) for key in old_shards if key in new_shards]
    altered = [
        f"{a.name} ({a.samples} samples, {a.size} bytes then; {b.samples} samples, {b.size} bytes now)"
        for a, b in both
        if (a.size, a.digest) != (b.size, b.digest)
    ]
    for word, names in (("gone", gone), ("new", new), ("changed", altered)):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"{len(names)} {word}: {', '.join(names[:_NAMED])}{more}")
    return "; ".join(parts if len(parts) > 1 else [*parts, "the same shards in another order"])


def _by_name(manifest: Manifest) -> dict[tuple[str, int], Shard]:
    """Shards by base name; shards of the same name in different folders are numbered."""
    turns: Counter[str] = Counter()
    shards = {}
    for shard in manifest.shards:
        shards[shard.name, turns[shard.name]] = shard
        turns[shard.name] += 1
    return shards
