"""A real MLflow server that tests may kill and start again."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class MlflowServer:
    """A server on a port of its own, over an SQLite file.

    Args:
        folder: its database, artifacts and log.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def group(self) -> int:
        """Process group of the server and all its children; 0 if it is not running."""
        return self._process.pid if self._process is not None else 0

    def start(self, seconds: float = 1200) -> None:
        """Starts it and waits until it answers."""
        words = [
            "server",
            "--backend-store-uri",
            f"sqlite:///{self._folder}/mlflow.db",
            "--port",
            str(self._port),
            "--workers",
            "1",
        ]
        words += ["--artifacts-destination", str(self._folder / "artifacts"), "--host", "127.0.0.1"]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.3)
        raise AssertionError((self._folder / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        """Kills it, with all its children."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None
