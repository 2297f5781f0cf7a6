"""Resolves the MLflow server of a run: from its settings, from the environment, or the run's own SQLite file."""

from __future__ import annotations

import json
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.paths import absolute
from pipeline.errors import FoveaError
from pipeline.tracking.mlflow_database import OWN, uri_of
from pipeline.tracking.settings import TrackingSettings
from pipeline.untrusted import read_json, shown_address

_FILE = "destination.json"
_EXPERIMENT = "fovea"
_ORIGINS = ("", "tracking.uri", "MLFLOW_TRACKING_URI")


@dataclass(frozen=True)
class Destination:
    """An MLflow server and experiment.

    Attributes:
        uri: tracking URI.
        experiment: name of the experiment.
        origin: what named the server: ``tracking.uri``, ``MLFLOW_TRACKING_URI``, or empty for the run's own file.
    """

    uri: str
    experiment: str
    origin: str = ""

    def __str__(self) -> str:
        """The server with secrets masked, and what named it."""
        return shown_address(self.uri) + (f" ({self.origin})" if self.origin else "")

    def record(self, tracking: Path) -> None:
        """Saves what the environment named, for later commands in another shell."""
        if self.origin == "MLFLOW_TRACKING_URI" or (tracking / _FILE).exists():
            tracking.mkdir(parents=True, exist_ok=True)
            temporary = tracking / f".{_FILE}.{os.getpid()}"
            temporary.write_text(json.dumps({"uri": self.uri, "experiment": self.experiment, "origin": self.origin}))
            temporary.replace(tracking / _FILE)


def destination(settings: TrackingSettings, run: Path, environment: Mapping[str, str] | None = None) -> Destination:
    """Returns the MLflow server and experiment of a run.

    ``tracking.uri`` takes precedence, then ``MLFLOW_TRACKING_URI``, then the value of that variable when the run was trained,
    then ``<run>/mlflow.db``. Likewise ``tracking.experiment``, ``MLFLOW_EXPERIMENT_NAME``, ``fovea``.

    Args:
        settings: the run's section ``tracking``.
        run: the run directory.
        environment: environment variables; by default those of this process.
    """
    env = os.environ if environment is None else environment
    kept = _recorded(run / "tracking" / _FILE)
    experiment = settings.experiment or env.get("MLFLOW_EXPERIMENT_NAME", "").strip() or kept.get("experiment") or _EXPERIMENT
    if settings.uri:
        return Destination(settings.uri, experiment, "tracking.uri")
    named = env.get("MLFLOW_TRACKING_URI", "").strip()
    if named:
        return Destination(absolute(named, "uri"), experiment, "MLFLOW_TRACKING_URI")
    if kept.get("uri") and kept.get("origin"):
        return Destination(kept["uri"], experiment, kept["origin"])
    return Destination(uri_of((run / OWN).resolve()), experiment)


def unanswered(uri: str, seconds: float = 3.0) -> str:
    """Returns why a server cannot be reached, in a word or two; empty if it can, or if a proxy leads to it.

    Args:
        uri: tracking URI; only ``http`` and ``https`` are tried.
        seconds: time for the connection.
    """
    try:
        parts = urllib.parse.urlsplit(uri)
        if parts.scheme not in ("http", "https") or not parts.hostname or urllib.request.getproxies().get(parts.scheme):
            return ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=seconds).close()
    except TimeoutError:
        return "no answer in time"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or type(error).__name__
    return ""


def _recorded(path: Path) -> dict[str, str]:
    """Reads what :meth:`Destination.record` saved; empty if missing or malformed. The content is untrusted."""
    try:
        document = read_json(path, limit=1 << 20)
    except (OSError, FoveaError):
        return {}
    kept = {key: value for key, value in document.items() if isinstance(value, str)} if isinstance(document, dict) else {}
    return kept if kept.get("origin", "") in _ORIGINS else {}
