"""Chooses the newest checkpoint that is complete. Does not import torch."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint.catalog import Row, rows
from pipeline.checkpoint.files import Saved, read, verify
from pipeline.errors import CheckpointError
from pipeline.untrusted import printable


def newest(directory: Path, *, begun_at: Path | None = None) -> tuple[Saved | None, list[str]]:
    """Finds the newest checkpoint whose files all verify; also returns a message for each newer one that was skipped.

    The newest is the one written last: a run that rolled back to an earlier step continues from there.

    Args:
        directory: ``<run>/checkpoints``.
        begun_at: consider only checkpoints of attempts that ``checkpoint.resume`` started from this checkpoint.

    Raises:
        CheckpointError: checkpoints exist, but none is complete.
    """
    complaints: list[str] = []
    committed = rows(directory)
    candidates = committed[::-1]
    if begun_at is not None:
        candidates = _descendants(candidates, directory, begun_at)
    readable = {row.name for row in committed}
    unreadable = sorted(path for path in directory.glob("step_*") if path.name not in readable and path.is_dir())
    if begun_at is None:
        complaints += [f"{printable(str(path))}: its manifest cannot be read, so it is passed over" for path in unreadable]
    for row in candidates:
        try:
            saved = read(directory / row.name)
            verify(saved)
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        return saved, complaints
    if complaints and begun_at is None:
        count = len(candidates) + len(unreadable)
        raise CheckpointError(
            f"none of the {count} checkpoints is complete; the newest: {complaints[-len(candidates)]}",
            where=str(directory),
            hint="Restore one from a copy, or start a new run in another run.directory",
        )
    return None, complaints


def _descendants(candidates: list[Row], directory: Path, begun_at: Path) -> list[Row]:
    """Checkpoints that descend from an attempt started from this path, if the path still holds the same checkpoint."""
    try:
        started_from = read(begun_at).id
    except CheckpointError:  # deleted since
        started_from = None
    where = str(begun_at.resolve())
    return [
        row
        for row in candidates
        if any(path == where and started_from in (None, id) for id, path in row.origins)
        and str((directory / row.name).resolve()) != where
    ]
