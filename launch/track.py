"""``fovea track``: bring MLflow up to what runs have kept in their journals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ConfigError, LaunchError
from pipeline.training.run import RunDirectory

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
    behind = [name for name in (_sync(one, uri) for one in chosen) if name]
    if behind:
        raise LaunchError(
            f"MLflow did not take everything of {', '.join(behind)}", hint="is the server up? the same command goes on"
        )


def _there(pattern: str) -> list[Path]:
    return sorted(Path("runs").glob(f"{pattern}/config.json"))


def _sync(run: RunDirectory, uri: str | None) -> str:
    """Sends one run's journals; its name if something is left."""
    from pipeline.settings import Config
    from pipeline.tracking import Shipper, asides

    config = Config.model_validate(json.loads(run.config.read_text()))
    target = uri or config.tracking.uri or f"sqlite:///{(run.path / 'mlflow.db').resolve()}"
    shipper = Shipper(run.tracking, uri=target, experiment=config.tracking.experiment, name=config.run.name, log=print)
    shipper.start()
    done = shipper.close(seconds=300.0)
    for folder, aside in asides(run.tracking):  # evaluations by hand, after the run that they may belong to
        other = (replace(aside, uri=uri) if uri else aside).shipper(folder, log=print)
        other.start()
        done = other.close(seconds=300.0) and done
    print(f"{run.path.name}: {'MLflow has everything' if done else 'not everything was accepted'} ({target})")
    return "" if done else run.path.name
