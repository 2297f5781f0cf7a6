"""Copies journals to MLflow in a background thread: a slow or unreachable server never delays training, and no record is lost.

The cursor file stores the MLflow run, how far each journal was accepted, and the last step of each metric. A resumed attempt
repeats the steps after its checkpoint bit for bit, so points of steps that were already sent are skipped.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, FoveaError, LaunchError
from pipeline.runtime.locks import lock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import mlflow_database as database
from pipeline.tracking.journal import read
from pipeline.untrusted import hide_secrets, inside, open_regular, printable, read_json, shown_address

_BATCH = 900
_LIMITS = {"metrics": 900, "params": 100, "tags": 100}
_PARAM_LIMIT, _TAG_LIMIT = 6000, 5000
_PAUSES = (1.0, 30.0)
_ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_GONE = "RESOURCE_DOES_NOT_EXIST"
_REFUSED = "INVALID_PARAMETER_VALUE"
_PARENT = "mlflow.parentRunId"


class Shipper:
    """Sends all journals of a run to one MLflow run.

    Attributes:
        trouble: the last error; ``None`` once everything was accepted.

    Args:
        folder: ``<run>/tracking``, with ``journal-*.jsonl``; the cursor is stored there.
        uri: MLflow tracking URI.
        experiment: MLflow experiment, created if missing.
        name: name of the run.
        log: receives a message when the server is unreachable, once per outage, and for rejected data, once per name.
        joins: another shipper's cursor, whose MLflow run is used instead of a new one. Records wait until that run exists.
        once: skip points at steps that a metric already has: an attempt that repeats them records the same values.
        root: the only directory whose files are sent as artifacts, after resolving links; by default the run directory, the
            parent of ``folder``.
        sweep: directory of the sweep that the run belongs to; its MLflow run, created if missing, becomes the parent.
    """

    def __init__(
        self,
        folder: Path,
        *,
        uri: str,
        experiment: str,
        name: str,
        log: Callable[[str], None] = lambda _: None,
        joins: Path | None = None,
        once: bool = True,
        root: Path | None = None,
        sweep: Path | None = None,
    ) -> None:
        self._sweep = sweep
        self._folder, self._uri, self._experiment, self._name, self._log = folder, uri, experiment, name, log
        self._joins, self._once, self._root = joins, once, root or folder.parent
        self._cursor_path = folder / "cursor.json"
        known = _load(self._cursor_path)
        self._cursor = known if known.get("uri") == uri else _cursor(uri, "")
        self._client: Any = None
        self.trouble: Exception | None = None
        self._refused: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fovea-mlflow", daemon=True)

    def start(self) -> None:
        """Starts the background thread."""
        self._thread.start()

    def close(self, seconds: float = 5.0) -> bool:
        """Sends the remaining records, for at most ``seconds``.

        Returns:
            Whether everything was accepted; if not, the next attempt sends the rest.
        """
        self._stop.set()
        self._thread.join(timeout=seconds)
        return not self._thread.is_alive() and not self._pending()

    def connected(self) -> tuple[Any, str]:
        """Returns MLflow's client and the ID of this run, which is created if missing.

        Raises:
            Exception: any error of MLflow.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        client = self._connect()
        return client, str(self._cursor["run_id"])

    def _pending(self) -> bool:
        unsent = (next(read(path, self._offset(path)), None) for path in self._journals())
        return bool(self._cursor["artifacts"]) or any(unsent)

    def _journals(self) -> list[Path]:
        return sorted(self._folder.glob("journal-*.jsonl"))

    def _offset(self, path: Path) -> int:
        return int(self._cursor["offsets"].get(path.name, 0))

    def _run(self) -> None:
        pause, away = _PAUSES[0], False
        while True:
            last = self._stop.is_set()
            try:
                self.ship()
                pause, away, self.trouble = _PAUSES[0], False, None
            except Exception as error:  # no error of MLflow may reach training
                self._client, self.trouble = None, error
                if not away:
                    server = shown_address(self._uri)
                    self._log(f"MLflow at {server} accepts no records now ({_line(error)}); the journal keeps everything")
                pause, away = min(2 * pause, _PAUSES[1]), True
            if last:
                return
            self._stop.wait(pause)

    def ship(self) -> None:
        """Sends everything that the server has not accepted yet.

        Raises:
            Exception: any error of MLflow; the cursor keeps what was accepted before it.
        """
        if not self._pending():
            return
        client = self._connect()
        for path in self._journals():
            records = read(path, self._offset(path))
            while chunk := list(islice(records, _BATCH)):
                self._send(client, [record for _, record in chunk])
                self._cursor["offsets"][path.name] = chunk[-1][0]
                self._write_cursor()
        while self._cursor["artifacts"]:  # last, so that a broken artifact store delays nothing else
            self._send_artifact(client, self._cursor["artifacts"][0])
            del self._cursor["artifacts"][0]
            self._write_cursor()

    def _send_artifact(self, client: Any, named: str) -> None:
        """Uploads a regular file of the run directory to the run's artifacts; logs what is skipped, and why."""
        shown = printable(named, limit=200)
        try:
            path = inside(named, self._root, where="journal")
            os.close(open_regular(path))
        except FileNotFoundError:
            self._log(f"{shown} is gone and cannot be sent to MLflow")
        except (DataError, OSError) as error:
            reason = error.what if isinstance(error, DataError) else error.strerror
            self._log(f"an artifact is not sent to MLflow: {reason}")
        else:
            target = client.get_run(self._cursor["run_id"]).info.artifact_uri
            if self._uri.startswith("sqlite:///") and not self._may_store(target):
                self._log(f"{shown} is not sent: the run's database would store it in {printable(str(target), limit=200)}")
                return
            client.log_artifact(self._cursor["run_id"], str(path))

    def _may_store(self, target: str) -> bool:
        """Whether a database in the run directory, which may be untrusted, stores its artifacts there too."""
        try:
            inside(self._uri.removeprefix("sqlite:///"), self._root, where="uri")
        except DataError:
            return True  # a database that the user named
        try:
            inside(target.removeprefix("file://"), self._root, where="artifacts")
        except DataError:
            return False
        return "://" not in target.removeprefix("file://")

    def _write_cursor(self) -> None:
        temporary = self._cursor_path.with_suffix(f".tmp{os.getpid()}-{time.monotonic_ns()}")
        temporary.write_text(json.dumps(self._cursor))
        temporary.replace(self._cursor_path)

    def _connect(self) -> Any:
        """Returns a client whose run exists. A deleted run is replaced by a new one, to which everything is sent again."""
        if self._client is not None:
            return self._client
        joined = self._joined()
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        path = database.path_of(self._uri)
        folders = (self._folder.resolve(), *self._folder.resolve().parents)
        own = path is not None and path.name == database.OWN and path.parent.resolve() / "tracking" in folders
        database.ensure(self._uri, own=own, log=self._log)
        client = MlflowClient(tracking_uri=self._uri)
        if joined:
            self._join(client, joined)
        elif not self._cursor["run_id"] or not _exists(client, self._cursor["run_id"]):
            experiment = client.get_experiment_by_name(self._experiment)
            if experiment is None:
                artifact_location = (
                    str((self._folder / "artifacts").resolve()) if database.path_of(self._uri) is not None else None
                )
                number = client.create_experiment(self._experiment, artifact_location=artifact_location)
            elif experiment.lifecycle_stage != "active":
                raise LaunchError(
                    f"the experiment {self._experiment!r} is deleted",
                    where=shown_address(self._uri),
                    hint="Restore it with `mlflow experiments restore`, or set tracking.experiment to another name",
                )
            else:
                number = experiment.experiment_id
            tags = {_PARENT: self._parent()} if self._sweep is not None else {}
            self._cursor = _cursor(self._uri, client.create_run(number, run_name=self._name, tags=tags).info.run_id)
            self._write_cursor()
        self._client = client
        return client

    def _parent(self) -> str:
        """Returns the ID of the sweep's MLflow run on this server; the first of its members creates it."""
        assert self._sweep is not None
        folder = RunDirectory(self._sweep).own_folder("tracking")
        with (folder / ".lock").open("a") as file:
            lock(file.fileno(), file.name)
            return Shipper(folder, uri=self._uri, experiment=self._experiment, name=self._sweep.name).connected()[1]

    def _joined(self) -> str:
        """Returns the ID of the MLflow run to join; empty if a new one is to be created."""
        if self._joins is None:
            return ""
        theirs = _load(self._joins)
        if theirs.get("uri") != self._uri or not theirs.get("run_id"):
            raise LookupError("the run itself is not there yet")
        return str(theirs["run_id"])

    def _join(self, client: Any, run_id: str) -> None:
        if not _exists(client, run_id):
            raise LookupError("the run itself is not there any more")
        if run_id != self._cursor["run_id"]:
            self._cursor = _cursor(self._uri, run_id)
            self._write_cursor()

    def _send(self, client: Any, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id, steps = self._cursor["run_id"], self._cursor["steps"]
        metrics: list[Any] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        changed = 0.0
        newest = dict(steps)
        for record in records:
            kind, values = record["kind"], record.get("values", {})
            if kind == "metrics":
                known = newest if self._once else {}
                fresh = {key: value for key, value in values.items() if record["step"] > known.get(key, -1)}
                metrics += [Metric(key, float(value), int(record["t"] * 1000), record["step"]) for key, value in fresh.items()]
                newest.update(dict.fromkeys(fresh, record["step"]))
            elif kind == "params":
                params.update({key: value[:_PARAM_LIMIT] for key, value in values.items()})
            elif kind == "tags":
                tags.update({key: value[:_TAG_LIMIT] for key, value in values.items()})
                changed = record["t"] if "fovea.state" in values else changed
            elif kind == "artifact" and record["path"] not in self._cursor["artifacts"]:
                self._cursor["artifacts"].append(record["path"])
        have = client.get_run(run_id).data.params if params else {}
        tags.update({f"changed.{key}": value[:_TAG_LIMIT] for key, value in params.items() if have.get(key, value) != value})
        for low in range(0, len(metrics), _LIMITS["metrics"]):
            part = metrics[low : low + _LIMITS["metrics"]]
            self._offer(client, "metrics", part)
            steps.update({metric.key: metric.step for metric in part})
            self._write_cursor()
        self._offer(client, "params", [Param(key, value) for key, value in params.items() if key not in have])
        self._offer(client, "tags", [RunTag(key, value) for key, value in tags.items()])
        state = tags.get("fovea.state")
        if state in _ENDS:
            client.set_terminated(run_id, _ENDS[state], int(changed * 1000))
        elif state is not None:
            client.update_run(run_id, status="RUNNING")

    def _offer(self, client: Any, kind: str, items: list[Any]) -> None:
        """Sends items; those that the server rejects permanently are logged and skipped, so that they block nothing else."""
        from mlflow.exceptions import MlflowException

        run_id = self._cursor["run_id"]
        for low in range(0, len(items), _LIMITS[kind]):
            part = items[low : low + _LIMITS[kind]]
            try:
                client.log_batch(run_id, **{kind: part}, synchronous=True)
            except MlflowException as error:
                if error.error_code != _REFUSED or not _exists(client, run_id):
                    raise
                if len(part) > 1:
                    self._offer(client, kind, part[: len(part) // 2])
                    self._offer(client, kind, part[len(part) // 2 :])
                elif part[0].key not in self._refused:
                    self._refused.add(part[0].key)
                    self._log(f"MLflow refuses {kind} {part[0].key!r} ({_line(error)}); they stay in the journal only")


def _exists(client: Any, run_id: str) -> bool:
    """Whether a run exists and is not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != _GONE:
            raise
        return False


def _line(error: Exception) -> str:
    return printable(hide_secrets((str(error).strip() or type(error).__name__).splitlines()[0][:4000]), limit=160)


def _cursor(uri: str, run_id: str) -> dict[str, Any]:
    return {"uri": uri, "run_id": run_id, "offsets": {}, "steps": {}, "artifacts": []}


def _load(path: Path) -> dict[str, Any]:
    """Reads a cursor; empty if missing, or if one of its values has a wrong type."""
    try:
        loaded = read_json(path)
    except (OSError, FoveaError):
        return {}
    kinds = {"uri": str, "run_id": str, "offsets": dict, "steps": dict, "artifacts": list}
    if not isinstance(loaded, dict) or any(not isinstance(loaded.get(key), kind) for key, kind in kinds.items()):
        return {}
    numbers = [*loaded["offsets"].values(), *loaded["steps"].values()]
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers) or any(type(a) is not str for a in loaded["artifacts"]):
        return {}
    return loaded
