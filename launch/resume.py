"""What an attempt starts from: the newest whole checkpoint of the same run over the same data, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import difference
from pipeline.errors import CheckpointError
from pipeline.settings import Config
from pipeline.training import saved
from pipeline.training.inputs import Inputs, check_data
from pipeline.training.run import RunDirectory
from pipeline.training.saved import Saved


def check_identity(config: Config, old: dict[str, Any], where: Path) -> None:
    """Refuse to go on with a run whose mathematics has changed.

    Raises:
        CheckpointError: the settings that differ, old and new.
    """
    try:
        changed = difference(Config.model_validate(old), config)
    except ValidationError as error:
        raise CheckpointError(
            f"its settings cannot be read by this version of fovea ({error.error_count()} of them, the first is "
            f"{'.'.join(map(str, error.errors()[0]['loc']))})",
            where=str(where),
            mend="use the version that wrote it, or choose another run.directory",
        ) from error
    if changed:
        shown = "; ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in list(changed.items())[:5])
        raise CheckpointError(
            f"it belongs to a run with other settings ({shown}{'; …' if len(changed) > 5 else ''})",
            where=str(where),
            mend="put the settings back, or choose another run.directory",
        )


def choose_checkpoint(config: Config, run: RunDirectory, inputs: Inputs) -> tuple[Saved | None, list[str]]:
    """What this attempt starts from, verified, and sentences worth saying: damaged ones passed over, changed data accepted.

    Raises:
        CheckpointError: nothing whole is there, or it belongs to another run or other data.
    """
    wanted = config.checkpoint.resume
    complaints: list[str] = []
    if wanted == "never":
        if saved.listed(run.checkpoints):
            raise CheckpointError(
                "checkpoint.resume=never, but the run has checkpoints",
                where=str(run.checkpoints),
                mend="choose another run.directory, or checkpoint.resume=auto to go on",
            )
        return None, complaints
    if wanted == "auto":
        found, complaints = saved.newest(run.checkpoints)
    else:
        found = saved.read(Path(wanted))
        saved.verify(found)
    if found is not None:
        check_identity(config, found.manifest["config"], found.path)
        if accepted := check_data(found, inputs, allow=config.checkpoint.allow_data_change):
            complaints.append(accepted)
    return found, complaints
