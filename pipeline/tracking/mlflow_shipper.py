"""Copies journals to MLflow; see :mod:`pipeline.tracking.shipper`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pipeline.errors import DataError, LaunchError
from pipeline.runtime.locks import lock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import mlflow_database as database
from pipeline.tracking.shipper import JournalShipper, first_line, load_cursor, new_cursor
from pipeline.untrusted import inside, printable, shown_address

_LIMITS = {"metrics": 900, "params": 100, "tags": 100}
_PARAM_LIMIT, _TAG_LIMIT = 6000, 5000
_ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_GONE = "RESOURCE_DOES_NOT_EXIST"
_REFUSED = "INVALID_PARAMETER_VALUE"
_PARENT = "mlflow.parentRunId"


class Shipper(JournalShipper):
    """Sends all journals of a run to one MLflow run.

    Args:
        folder: ``<run>/tracking``, with ``journal-*.jsonl``; the cursor is stored there.
        uri: MLflow tracking URI.
        experiment: MLflow experiment, created if missing.
        name: name of the run.
        log, once, root: see :class:`pipeline.tracking.shipper.JournalShipper`.
        joins: another shipper's cursor, whose MLflow run is used instead of a new one. Records wait until that run exists.
        sweep: directory of the sweep that the run belongs to; its MLflow run, created if missing, becomes the parent.
    """

    tracker: ClassVar[str] = "MLflow"

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
        super().__init__(folder, uri=uri, log=log, once=once, root=root)
        self._experiment, self._name, self._joins, self._sweep = experiment, name, joins, sweep
        self._client: Any = None
        self._refused: set[str] = set()

    def connected(self) -> tuple[Any, str]:
        """Returns MLflow's client and the ID of this run, which is created if missing.

        Raises:
            Exception: any error of MLflow.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        client = self._connect()
        return client, str(self._cursor["run_id"])

    def _disconnect(self, *, failed: bool) -> None:
        self._client = None

    def _upload(self, path: Path) -> None:
        target = self._client.get_run(self._cursor["run_id"]).info.artifact_uri
        if self._uri.startswith("sqlite:///") and not self._may_store(target):
            shown = printable(str(path), limit=200)
            self._log(f"{shown} is not sent: the run's database would store it in {printable(str(target), limit=200)}")
            return
        self._client.log_artifact(self._cursor["run_id"], str(path))

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
            self._cursor = new_cursor(self._uri, client.create_run(number, run_name=self._name, tags=tags).info.run_id)
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
        theirs = load_cursor(self._joins)
        if theirs.get("uri") != self._uri or not theirs.get("run_id"):
            raise LookupError("the run itself is not there yet")
        return str(theirs["run_id"])

    def _join(self, client: Any, run_id: str) -> None:
        if not _exists(client, run_id):
            raise LookupError("the run itself is not there any more")
        if run_id != self._cursor["run_id"]:
            self._cursor = new_cursor(self._uri, run_id)
            self._write_cursor()

    def _send(self, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client, run_id, steps = self._client, self._cursor["run_id"], self._cursor["steps"]
        metrics: list[Any] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        changed = 0.0
        newest = dict(steps)
        for record in records:
            kind, values = record["kind"], record.get("values", {})
            if kind == "metrics":
                fresh = self._fresh(record, newest)
                metrics += [Metric(key, value, int(record["t"] * 1000), record["step"]) for key, value in fresh.items()]
            elif kind == "params":
                params.update({key: value[:_PARAM_LIMIT] for key, value in values.items()})
            elif kind == "tags":
                tags.update({key: value[:_TAG_LIMIT] for key, value in values.items()})
                changed = record["t"] if "fovea.state" in values else changed
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
        if state is not None and self._sweep is not None:
            try:
                self._update_parent(ended=state in _ENDS)
            except Exception as error:  # as wide as MLflow's; a member's own records do not wait for it
                self._log(f"MLflow: the state of the sweep's run is not updated ({first_line(error)})")

    def _update_parent(self, *, ended: bool) -> None:
        """Sets the state of the sweep's run: running while a member runs, ended with the last of them. On a cluster nothing else
        does, unless ``fovea sweep`` waits."""
        assert self._sweep is not None
        client, own = self._client, self._client.get_run(self._cursor["run_id"])
        parent = own.data.tags.get(_PARENT, "")
        if not parent:
            return
        if not ended:
            client.set_tag(parent, "fovea.state", "running")
            client.update_run(parent, status="RUNNING")
            return
        states: dict[str, str] = {}
        token = None
        while True:
            condition = f"tags.`{_PARENT}` = '{parent}'"
            page = client.search_runs([own.info.experiment_id], condition, max_results=1000, page_token=token)
            for run in page:  # the newest first: an older one of the same member ended with the folder of its records
                states.setdefault(run.info.run_name, run.info.status)
            if not (token := page.token):
                break
        size = RunDirectory(self._sweep).sweep_size
        if not size or len(states) < size or not set(states.values()) <= set(_ENDS.values()):
            return
        state = "finished" if set(states.values()) == {_ENDS["finished"]} else "stopped"
        client.set_tag(parent, "fovea.state", state)
        client.set_terminated(parent, _ENDS[state])

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
                    self._log(f"MLflow refuses {kind} {part[0].key!r} ({first_line(error)}); they stay in the journal only")


def _exists(client: Any, run_id: str) -> bool:
    """Whether a run exists and is not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != _GONE:
            raise
        return False
