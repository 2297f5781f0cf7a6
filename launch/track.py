"""``fovea track``: bring MLflow up to what runs have kept in their journals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ConfigError, FoveaError, LaunchError
from pipeline.training.run import RunDirectory
from pipeline.untrusted import hide_secrets, printable

app = typer.Typer(no_args_is_help=True, help="What MLflow is told.")


@app.callback()
def _group() -> None:
    """Keeps ``sync`` a verb of its own, also while it is the only one."""


@app.command()
def sync(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's directory, or its name below runs/.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All runs below runs/.")] = False,
    uri: Annotated[str | None, typer.Option(help="Another MLflow server than the run was configured with.")] = None,
) -> None:
    """Send what a run's journals hold and MLflow has not accepted yet: after an outage, or from a machine without network.

    [b]Examples[/b]

    fovea track sync runs/trial

    fovea track sync --all --uri http://mlflow:5000
    """
    if everything == (run is not None):
        raise ConfigError("no run is named", where="fovea track sync", hint="name one, or give --all")
    from launch.cluster.status import find

    every = [RunDirectory(file.parent) for file in [*_there("*"), *_there("evaluations/*")]]
    chosen = [find(run)] if run is not None else every
    behind = {one.path.name: trouble for one in chosen if (trouble := _sync(one, uri)) is not None}
    if behind:
        last = next((trouble for trouble in behind.values() if isinstance(trouble, FoveaError)), None)
        hint = last.hint if last else "Is the server up? The same command sends the rest"
        raise LaunchError(f"MLflow did not take everything of {', '.join(behind)}", hint=hint)


def _there(pattern: str) -> list[Path]:
    return sorted(Path("runs").glob(f"{pattern}/config.json"))


def _sync(run: RunDirectory, uri: str | None) -> Exception | None:
    """Sends one run's journals; why something is left, ``None`` if nothing is."""
    from pipeline.settings import Config
    from pipeline.tracking import Shipper, asides, destination

    config = Config.model_validate(json.loads(run.config.read_text()))
    place = destination(config.tracking, run.path)
    target = uri or place.uri
    shipper = Shipper(run.tracking, uri=target, experiment=place.experiment, name=config.run.name, log=print)
    shipper.start()
    done = shipper.close(seconds=300.0)
    trouble = shipper.trouble
    for folder, aside in asides(run.tracking):  # evaluations by hand, after the run that they may belong to
        other = (replace(aside, uri=uri) if uri else aside).shipper(folder, log=print)
        other.start()
        done = other.close(seconds=300.0) and done
        trouble = trouble or other.trouble
    shown = printable(hide_secrets(target))
    print(f"{run.path.name}: {'MLflow has everything' if done else 'not everything was accepted'} ({shown})")
    return None if done else trouble or TimeoutError("MLflow did not answer in time")
