"""Selects the checkpoint to start from: the newest complete one of the same run over the same data, or none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.checkpoint import catalog, selection
from pipeline.checkpoint import files as saved
from pipeline.checkpoint import mirror as copies
from pipeline.checkpoint.data_check import check_data
from pipeline.checkpoint.files import Saved
from pipeline.config.load import difference
from pipeline.config.schema import Config
from pipeline.data.indexing import open_storage
from pipeline.data.inputs import Inputs
from pipeline.errors import CheckpointError
from pipeline.masking import shown
from pipeline.runtime.run_directory import RunDirectory


def check_identity(config: Config, old: dict[str, Any], where: Path) -> None:
    """Refuse to resume a run if settings that change its results differ.

    Raises:
        CheckpointError: the settings that differ, old and new.
    """
    try:
        changed = difference(Config.model_validate(old), config)
    except ValidationError as error:
        raise CheckpointError(
            f"the settings of the checkpoint cannot be read by this version of fovea "
            f"({error.error_count()} of them, the first is "
            f"{'.'.join(map(str, error.errors()[0]['loc']))})",
            where=str(where),
            hint="Use the version that wrote it, or choose another run.directory",
        ) from error
    if changed:
        shown = "; ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in list(changed.items())[:5])
        raise CheckpointError(
            f"the checkpoint belongs to a run with other settings ({shown}{'; …' if len(changed) > 5 else ''})",
            where=str(where),
            hint="Restore the settings, or choose another run.directory",
        )


def copies_of(config: Config) -> str | None:
    """Where the run's checkpoints are mirrored; the run's name separates those of several runs."""
    target = config.checkpoint.mirror
    return f"{target.rstrip('/')}/{config.run.name}" if target else None


def origins(checkpoint: Saved | None, config: Config) -> list[dict[str, str]]:
    """``id`` and ``path`` of the checkpoints that ``checkpoint.resume`` named for this attempt and those before it."""
    if checkpoint is None:
        return []
    resume_from = Path(config.checkpoint.resume).resolve()
    begun = config.checkpoint.resume not in ("auto", "never") and checkpoint.path.resolve() == resume_from
    return [*checkpoint.origins, {"id": checkpoint.id, "path": str(resume_from)}] if begun else checkpoint.origins


def choose_checkpoint(config: Config, run: RunDirectory, inputs: Inputs) -> tuple[Saved | None, list[str]]:
    """The verified checkpoint to start from, and messages about skipped checkpoints and accepted changes of the data.

    ``auto`` selects the run's last checkpoint; if the run has none, its newest mirrored copy is fetched. A path is where the run
    begins, or returns to: once the run has written checkpoints that descend from it, the last of those is selected, so that the
    same command can be repeated to resume.

    Args:
        config: the settings.
        run: the run directory.
        inputs: the indexed data.

    Raises:
        CheckpointError: no complete checkpoint, or it belongs to another run or other data.
    """
    choice = config.checkpoint.resume
    complaints: list[str] = []
    if choice == "never":
        if catalog.rows(run.checkpoints):
            raise CheckpointError(
                "checkpoint.resume=never, but the run has checkpoints",
                where=str(run.checkpoints),
                hint="Choose another run.directory, or checkpoint.resume=auto to resume",
            )
        return None, complaints
    if choice == "auto":
        checkpoint, complaints = selection.newest(run.checkpoints)
        target = copies_of(config)
        if checkpoint is None and target is not None:
            checkpoint, complaints = copies.fetch(target, run.checkpoints, open_storage(config, at_start=True))
    else:
        checkpoint, complaints = selection.newest(run.checkpoints, begun_at=Path(choice))
        if checkpoint is None:
            checkpoint = saved.read(Path(choice))
            saved.verify(checkpoint)
        else:
            complaints.append(
                f"resuming from {checkpoint.path}, which started from {choice}; move it away to start from there again"
            )
    if checkpoint is not None:
        check_identity(config, checkpoint.manifest.get("config") or {}, checkpoint.path)
        if accepted := check_data(checkpoint, inputs, allow=config.checkpoint.allow_data_change):
            complaints.append(accepted)
    return checkpoint, complaints


def continuing(config: Config) -> Config:
    """The settings of a start that continues what this launch or job has begun: ``never`` was obeyed when it began, and a
    mirrored copy would be that of another run of this name.
    """
    if config.checkpoint.resume != "never":
        return config
    return config.replace(checkpoint=config.checkpoint.model_copy(update={"resume": "auto", "mirror": None}))


def newest_snapshot(snapshots: Path | None) -> Saved | None:
    """The newest complete snapshot in host memory; what is damaged is reported.

    Args:
        snapshots: the run's folder in host memory, empty when the job or launch began; ``None`` for none.
    """
    if snapshots is None:
        return None
    try:
        snapshot, complaints = selection.newest(snapshots)
    except CheckpointError as error:
        snapshot, complaints = None, [str(error)]
    for complaint in complaints:
        print(shown(complaint), file=sys.stderr)
    return snapshot


def chosen_again(config: Config, run: RunDirectory, inputs: Inputs, snapshots: Path | None) -> Saved | None:
    """What ranks start from that are started again within a launch or job: of what this run has written, the newest.

    A checkpoint on disk is verified only if no snapshot has as many steps.

    Raises:
        CheckpointError: as :func:`choose_checkpoint`.
    """
    snapshot = newest_snapshot(snapshots)
    written = catalog.rows(run.checkpoints)
    if snapshot is not None and (not written or snapshot.step >= written[-1].step):
        return snapshot
    checkpoint, complaints = choose_checkpoint(continuing(config), run, inputs)
    for complaint in complaints:
        print(shown(complaint), file=sys.stderr)
    further = snapshot is not None and (checkpoint is None or snapshot.step > checkpoint.step)
    return snapshot if further else checkpoint
