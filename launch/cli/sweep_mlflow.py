"""The MLflow run of a sweep, under which those of its members are nested. No error of MLflow ends a sweep."""

from __future__ import annotations

from launch.sweep.state import Sweep
from pipeline.errors import FoveaError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.settings import TrackingSettings
from pipeline.untrusted import hide_secrets, printable


def shared_database(sweep: Sweep, tracking: TrackingSettings) -> str:
    """URI of one database for all members, where neither the settings nor the environment name a server; otherwise empty."""
    if not tracking.enabled:
        return ""
    from pipeline.tracking import Shipper, destination_of
    from pipeline.tracking.mlflow_database import OWN, uri_of

    target = destination_of(tracking, sweep.path, trained=True)
    if target.origin:
        return ""
    uri = uri_of(sweep.path / OWN)
    folder = RunDirectory(sweep.path).own_folder("tracking")
    try:
        Shipper(folder, uri=uri, experiment=target.experiment, name=sweep.path.name).connected()
    except Exception as error:  # as in the shipper itself
        print(f"the MLflow database of the sweep cannot be used ({_line(error)}); each member has its own", flush=True)
        return ""
    return uri


def close(sweep: Sweep, *, finished: bool) -> None:
    """Send what the members that were stopped early have not sent, and record the end of the sweep."""
    from pipeline.tracking import Journal, Shipper, destination_of

    target = None
    try:
        for number in sweep.numbers:
            run = sweep.run(number)
            if not run.config.exists() or not (config := run.settings()).tracking.enabled:
                continue
            run.own_folder(run.tracking.name)
            target = destination_of(config.tracking, run.path)
            above, name = sweep.path if target.origin else None, config.run.name
            own = Shipper(run.tracking, uri=target.uri, experiment=target.experiment, name=name, root=run.path, sweep=above)
            own.ship()
        if target is None or not target.origin:
            return
        folder = RunDirectory(sweep.path).own_folder("tracking")
        journal = Journal(folder / "journal-0000.jsonl")
        journal.tags({"fovea.sweep": sweep.path.name, "fovea.state": "finished" if finished else "stopped"})
        journal.close()
        Shipper(folder, uri=target.uri, experiment=target.experiment, name=sweep.path.name).ship()
    except Exception as error:
        what = error.what if isinstance(error, FoveaError) else _line(error)
        print(f"MLflow has not received everything ({what}); `fovea mlflow sync RUN` sends a member's rest", flush=True)


def _line(error: Exception) -> str:
    return printable(hide_secrets((str(error).strip() or type(error).__name__).splitlines()[0]), limit=160)
