"""Copies journals to MLflow from a thread of its own: a dead, slow or full server costs training nothing, and nothing is lost.

The cursor file says how far each journal has been accepted, and the last step shipped. A resumed attempt repeats the steps after its
checkpoint bit for bit, so points of a step that was shipped already are left out rather than sent twice.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.tracking.journal import read

_BATCH = 900
_PARAM_LIMIT, _TAG_LIMIT = 6000, 5000
_PAUSES = (1.0, 30.0)


class Shipper:
    """Ships all journals of a run to one MLflow run.

    Args:
        folder: ``<run>/tracking``, with ``journal-*.jsonl``; cursor and run id are kept there.
        uri: MLflow tracking URI.
        experiment: MLflow experiment, made if it is not there.
        name: the run's name.
        log: where to say that the server is away; at most once an outage.
    """

    def __init__(self, folder: Path, *, uri: str, experiment: str, name: str, log: Callable[[str], None] = lambda _: None) -> None:
        self._folder, self._uri, self._experiment, self._name, self._log = folder, uri, experiment, name, log
        self._cursor_path, self._run_path = folder / "cursor.json", folder / "run.json"
        self._cursor: dict[str, Any] = _load(self._cursor_path, {"offsets": {}, "steps": {}})
        self._client: Any = None
        self._run_id: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fovea-mlflow", daemon=True)

    def start(self) -> None:
        """Begin shipping in the background."""
        self._thread.start()

    def close(self, seconds: float = 5.0) -> bool:
        """Ship what is left, for at most so long.

        Returns:
            Whether everything was accepted; if not, the next attempt or ``fovea track sync`` sends the rest.
        """
        self._stop.set()
        self._thread.join(timeout=seconds)
        return not self._thread.is_alive() and not self._pending()

    def _pending(self) -> bool:
        return any(path.stat().st_size > self._cursor["offsets"].get(path.name, 0) for path in self._journals())

    def _journals(self) -> list[Path]:
        return sorted(self._folder.glob("journal-*.jsonl"))

    def _run(self) -> None:
        pause, away = _PAUSES[0], False
        while True:
            last = self._stop.is_set()
            try:
                self.ship()
                pause, away = _PAUSES[0], False
            except Exception as error:  # the boundary: whatever MLflow raises must not reach training
                if not away:
                    self._log(f"MLflow at {self._uri} does not answer ({str(error).splitlines()[0][:160]}); the journal keeps everything")
                pause, away = min(2 * pause, _PAUSES[1]), True
            if last:
                return
            self._stop.wait(pause)

    def ship(self) -> None:
        """Send everything that the server has not accepted yet.

        Raises:
            Exception: whatever MLflow raises; what was accepted before it is remembered.
        """
        if not self._pending():
            return
        client, run_id = self._connect()
        for path in self._journals():
            records = list(read(path, self._cursor["offsets"].get(path.name, 0)))
            while records:
                chunk, records = records[:_BATCH], records[_BATCH:]
                self._send(client, run_id, [record for _, record in chunk])
                self._cursor["offsets"][path.name] = chunk[-1][0]
                _store(self._cursor_path, self._cursor)

    def _connect(self) -> tuple[Any, str]:
        if self._client is not None and self._run_id is not None:
            return self._client, self._run_id
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        client = MlflowClient(tracking_uri=self._uri)
        known = _load(self._run_path, {})
        run_id = known.get("run_id") if known.get("uri") == self._uri else None
        if run_id is not None:
            try:
                if client.get_run(run_id).info.lifecycle_stage == "deleted":
                    run_id = None
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                run_id = None
        if run_id is None:
            experiment = client.get_experiment_by_name(self._experiment)
            experiment_id = experiment.experiment_id if experiment else client.create_experiment(
                self._experiment, artifact_location=self._artifacts()
            )
            run_id = client.create_run(experiment_id, run_name=self._name).info.run_id
            _store(self._run_path, {"run_id": run_id, "uri": self._uri})
            self._cursor = {"offsets": {}, "steps": {}}
        client.update_run(run_id, status="RUNNING")
        self._client, self._run_id = client, run_id
        return client, run_id

    def _artifacts(self) -> str | None:
        return str((self._folder / "artifacts").resolve()) if self._uri.startswith("sqlite") else None

    def _send(self, client: Any, run_id: str, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics: list[Any] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        steps = dict(self._cursor["steps"])
        for record in records:
            kind = record["kind"]
            if kind == "metrics":
                for key, value in record["values"].items():
                    if record["step"] > steps.get(key, -1):
                        metrics.append(Metric(key, float(value), int(record["t"] * 1000), record["step"]))
                        steps[key] = record["step"]
            elif kind == "params":
                params.update({k: v[:_PARAM_LIMIT] for k, v in record["values"].items()})
            elif kind == "tags":
                tags.update({k: v[:_TAG_LIMIT] for k, v in record["values"].items()})
            elif kind == "artifact" and Path(record["path"]).exists():
                client.log_artifact(run_id, record["path"])
        have = client.get_run(run_id).data.params if params else {}
        fresh = [Param(k, v) for k, v in params.items() if k not in have]
        tags.update({f"changed.{k}": v for k, v in params.items() if k in have and have[k] != v})
        for low in range(0, len(metrics), _BATCH):
            client.log_batch(run_id, metrics=metrics[low : low + _BATCH])
        for low in range(0, len(fresh), 100):
            client.log_batch(run_id, params=fresh[low : low + 100])
        if tags:
            client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])
            if "fovea.state" in tags:
                status = {"finished": "FINISHED", "failed": "FAILED"}.get(tags["fovea.state"], "RUNNING")
                client.update_run(run_id, status=status)
        self._cursor["steps"] = steps


def _load(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
        return loaded
    except (OSError, ValueError):
        return default


def _store(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".tmp{os.getpid()}-{time.monotonic_ns()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)
