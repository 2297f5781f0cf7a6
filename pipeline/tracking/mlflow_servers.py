"""Decides which MLflow server may receive a run's journals: only one that the user named.

A run directory may come from another user. A server that it names would receive the user's credentials, and could cause files to
be written anywhere, since MLflow stores artifacts wherever the server says. A server is therefore accepted only if the user named
it on the command line or in ``MLFLOW_TRACKING_URI``, if this user has trained with it before (each training stores a digest of
its address in a file of the user), or if it is an SQLite file inside the run directory.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.runtime import known
from pipeline.tracking.destination import Destination, destination
from pipeline.tracking.mlflow_database import OWN, uri_of
from pipeline.tracking.settings import TrackingSettings
from pipeline.untrusted import NO_PASSWORD, has_password, inside, printable, shown_address

_SQLITE = "sqlite:///"
_KNOWN = "mlflow-servers"


def own_database(run: Path) -> str:
    """Returns the tracking URI of a run that names no server: an SQLite file in its directory."""
    return uri_of((run / OWN).resolve())


def server_of(run: Path, configured: str | None, *, named: str | None = None) -> str:
    """Returns the tracking URI for a run directory's journals.

    Args:
        run: the run directory.
        configured: ``tracking.uri`` of the run's own settings; ``None`` for its SQLite file.
        named: server given on the command line, which is accepted without further checks.

    Raises:
        ConfigError: only the run directory names that server; the hint shows how to name it.
    """
    check_address(named or "", where="--uri or --track")
    uri = named or configured or own_database(run)
    if named or _own(run, uri) or _known(uri):
        return uri
    shown = shown_server(uri)
    raise ConfigError(
        f"the MLflow server {shown} is named by the run only, so it receives neither data nor credentials",
        where=printable(str(run)),
        hint="If it is yours, give its address: --uri (of fovea eval: --track), or MLFLOW_TRACKING_URI",
    )


def destination_of(settings: TrackingSettings, run: Path, *, named: str | None = None, trained: bool = False) -> Destination:
    """Returns the destination of a run directory's journals: :func:`destination` with the check of :func:`server_of`.

    Args:
        settings: section ``tracking`` of the run's own settings.
        run: the run directory.
        named: server given on the command line.
        trained: whether the user starts or resumes this training, and so has named the server in its settings.

    Raises:
        ConfigError: only the run directory names the server, or its address contains a password.
    """
    target = destination(settings, run)
    here = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    by_user = target.uri if (settings.uri and trained) or (not settings.uri and here) else None
    check_address(target.uri, where=target.origin)
    return replace(target, uri=server_of(run, target.uri, named=named or by_user))


def check_address(uri: str, *, where: str) -> None:
    """Rejects a tracking URI with a user name or password, which would end up in files, logs and reports.

    Raises:
        ConfigError: the URI has credentials; the message says where they belong.
    """
    if has_password(uri):
        raise ConfigError(f"{shown_server(uri)}: {NO_PASSWORD}", where=where, hint="Remove them from the address")


def shown_server(uri: str) -> str:
    """Returns a tracking URI for display: printable, without user names, passwords and query values."""
    return shown_address(uri, limit=200)


def remember(uri: str) -> None:
    """Records a server that this user trains with, for :func:`server_of`. A directory that is not writable is no error."""
    known.add(_KNOWN, _name(uri))


def _own(run: Path, uri: str) -> bool:
    """Whether the URI is an SQLite file inside the run directory, after resolving links."""
    if uri == own_database(run):
        return not (run / OWN).is_symlink()
    path = uri.removeprefix(_SQLITE)
    if path == uri or "?" in path or "#" in path or "%" in path or path.startswith("file:") or not os.path.isabs(path):
        return False
    try:
        inside(path, run, where=uri, error=ConfigError)
    except ConfigError:
        return False
    return True


def _known(uri: str) -> bool:
    here = os.environ.get("MLFLOW_TRACKING_URI")
    return bool(here and _name(here) == _name(uri)) or known.is_known(_KNOWN, _name(uri))


def _name(uri: str) -> str:
    return uri.rstrip("/")
