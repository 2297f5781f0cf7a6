"""The trackers of a run: which are installed, and the shippers that copy its journals to them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.tracking import tensorboard_shipper
from pipeline.tracking.destination import Destination
from pipeline.tracking.mlflow_shipper import Shipper
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.shipper import JournalShipper
from pipeline.tracking.tensorboard_shipper import TensorBoardShipper
from pipeline.tracking.wandb_shipper import WandbShipper, mode


def check_installed(settings: TrackingSettings) -> None:
    """Checks that the package of each tracker is installed.

    Raises:
        ConfigError: one is not, with the extra to install.
    """
    for name in settings.to if settings.enabled else ():
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed", where="tracking.to", hint=f"Install it: pip install 'fovea[{name}]'")


def shippers(
    settings: TrackingSettings,
    folder: Path,
    *,
    name: str,
    destination: Destination | None,
    log: Callable[[str], None],
    sweep: Path | None = None,
) -> list[JournalShipper]:
    """Returns a shipper for each tracker of a run.

    Args:
        settings: section ``tracking``.
        folder: ``<run>/tracking``.
        name: name of the run.
        destination: the MLflow server, if MLflow is among them.
        log: receives the messages of all.
        sweep: directory of the sweep that the run belongs to, whose run in MLflow becomes the parent.
    """
    made: list[JournalShipper] = []
    for tracker in settings.to if settings.enabled else ():
        if tracker == "wandb":
            made.append(WandbShipper(folder, project=settings.experiment or "fovea", name=name, log=log))
        elif tracker == "tensorboard":
            made.append(TensorBoardShipper(folder, name=name, log=log))
        elif destination is not None:
            where = destination.uri, destination.experiment
            made.append(Shipper(folder, uri=where[0], experiment=where[1], name=name, log=log, sweep=sweep))
    return made


def described(settings: TrackingSettings, destination: Destination | None) -> str:
    """Returns where the trackers are and which variables decided it, for the log; empty if nothing was named."""
    parts = [f"MLflow at {destination}"] if destination is not None and destination.origin else []
    if settings.enabled and "wandb" in settings.to:
        heeded = sorted(key for key in os.environ if key.startswith("WANDB_") and key not in ("WANDB_API_KEY", "WANDB_SERVICE"))
        parts.append(f"W&B {mode()}" + (f" ({', '.join(heeded)})" if heeded else ""))
    if settings.enabled and "tensorboard" in settings.to:
        parts.append(f"TensorBoard in {tensorboard_shipper.FOLDER}/")
    return " · ".join(parts)
