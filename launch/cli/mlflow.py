"""``fovea mlflow``: sends the journals of runs to MLflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ConfigError, FoveaError, LaunchError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import printable

app = typer.Typer(no_args_is_help=True, help="Send the journals of runs to MLflow.")


@app.callback()
def _group() -> None:
    """Keeps ``sync`` a subcommand even while it is the only one."""


@app.command()
def sync(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run directory, or its name below runs/.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All runs below runs/.")] = False,
    uri: Annotated[str | None, typer.Option(help="An MLflow server other than the configured one.")] = None,
    timeout: Annotated[float, typer.Option(help="Longest wait for each tracker, seconds.", min=1.0)] = 300.0,
) -> None:
    """Send the journal records that MLflow has not received yet: after an outage, or for a run without network access.

    Where the ranks were killed, but their launcher or Slurm noted it, the run is recorded as failed or stopped.

    [b]Examples[/b]

    fovea mlflow sync runs/trial

    fovea mlflow sync --all --uri http://mlflow:5000
    """
    if everything == (run is not None):
        raise ConfigError("a run is required", where="fovea mlflow sync", hint="Name one or more, or add --all")
    from launch.slurm.status import find

    every = [RunDirectory(file.parent) for file in [*_there("*"), *_there("evaluations/*")]]
    chosen = [find(run)] if run is not None else every
    troubles = ((one.path.name, _sync_or_skip(one, uri, timeout, skip=everything)) for one in chosen)
    behind = {printable(name): trouble for name, trouble in troubles if trouble is not None}
    if behind:
        last = next((trouble for trouble in behind.values() if isinstance(trouble, FoveaError)), None)
        hint = last.hint if last else "Check that the server is running; the same command sends the rest"
        raise LaunchError(f"MLflow has not received all records of {', '.join(behind)}", hint=hint)


def _there(pattern: str) -> list[Path]:
    return sorted(Path("runs").glob(f"{pattern}/config.json"))


def _sync_or_skip(run: RunDirectory, uri: str | None, timeout: float, *, skip: bool) -> Exception | None:
    """:func:`send`; with ``skip`` a run that cannot be sent is printed and counted instead of ending the command."""
    try:
        return send(run, uri, timeout)
    except FoveaError as error:
        if not skip:
            raise
        print(f"skipped: {printable(str(error))}")
        return error


def send(run: RunDirectory, uri: str | None, timeout: float) -> Exception | None:
    """Send one run's journals; returns why something is left, or ``None``.

    Args:
        run: the run directory.
        uri: a server other than the configured one.
        timeout: longest wait for each tracker, seconds.

    Raises:
        FoveaError: the run, or its tracker, cannot be used.
    """
    from pipeline.tracking import Shipper, destination_of, eval_destinations, server_of, shippers, shown_server
    from pipeline.tracking.ended import record_end

    config = run.settings()
    run.own_folder(run.tracking.name)
    record_end(run)
    destination = destination_of(config.tracking, run.path, named=uri)
    target, name = destination.uri, printable(run.path.name)
    print(f"{name}: sending to {shown_server(target)}", flush=True)
    own = Shipper(
        run.tracking,
        uri=target,
        experiment=destination.experiment,
        name=config.run.name,
        log=_print,
        root=run.path,
        sweep=run.sweep if uri or destination.origin else None,
    )
    own.start()
    done = own.close(seconds=timeout)
    trouble = own.trouble
    for folder, evaluation in eval_destinations(run.tracking):  # after the run, which they may belong to
        server = server_of(run.path, evaluation.uri, named=uri or (target if evaluation.uri == target else None))
        other = replace(evaluation, uri=server).shipper(folder, log=_print)
        other.start()
        done = other.close(seconds=timeout) and done
        trouble = trouble or other.trouble
    others = config.tracking.model_copy(update={"to": tuple(one for one in config.tracking.to if one != "mlflow")})
    for shipper in shippers(others, run.tracking, name=config.run.name, destination=None, log=_print):
        shipper.start()
        print(
            f"{name}: {shipper.tracker} {'has everything' if shipper.close(seconds=timeout) else 'has not accepted everything'}"
        )
    print(f"{name}: {'MLflow has everything' if done else 'not everything was accepted'} ({shown_server(target)})")
    return None if done else trouble or TimeoutError("MLflow did not answer in time")


def _print(text: str) -> None:
    print(printable(text))
