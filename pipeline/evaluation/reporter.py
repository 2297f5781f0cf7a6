"""Sends the scores of standalone evaluations to MLflow."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from pipeline.config.load import flatten
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import EvalDestination, Journal, Shipper, check_address, destination, destination_of
from pipeline.tracking.mlflow_servers import shown_server

_PATIENCE = 30.0  # seconds to flush to MLflow at the end
Log = Callable[[str], None]


class EvalReporter:
    """Sends scores to MLflow through a journal, so that an unreachable server neither blocks nor loses anything.

    A run's scores are logged to the run's own MLflow run as ``eval/<metric>`` at the checkpoint's step. Pretrained weights, and
    runs that are sent to another server than their own, get a separate MLflow run.

    Args:
        folder: for journal and cursor, created with the first scores.
        destination: where the journal is sent.
        hint: command that sends the rest later.
        log: receives messages.
        params: settings to log first.
        refusal: why nothing is sent now; the journal is kept nevertheless.
    """

    def __init__(
        self,
        folder: Path,
        destination: EvalDestination,
        hint: str,
        *,
        log: Log,
        params: Mapping[str, Any] | None = None,
        refusal: str = "",
    ) -> None:
        self._folder, self._destination, self._hint, self._log = folder, destination, hint, log
        self._params, self._refusal = params, refusal
        self._journal: Journal | None = None
        self._shipper: Shipper | None = None

    @classmethod
    def of_run(cls, directory: Path, config: Config, uri: str | None, *, log: Log) -> Self | None:
        """Reporter for a run's checkpoints.

        Args:
            directory: the run.
            config: its settings.
            uri: an MLflow server other than the run's own.
            log: receives messages.

        Returns:
            ``None`` if the run is not tracked and no server is given.
        """
        run, tracking = RunDirectory(directory), config.tracking
        own = destination(tracking, run.path)
        if uri is None and not tracking.enabled:
            return None
        joins = "../cursor.json" if tracking.enabled and "mlflow" in tracking.to and uri in (None, own.uri) else ""
        try:
            destination_of(tracking, run.path, named=uri)
            refusal = ""
        except ConfigError as error:
            refusal = str(error)
        target = EvalDestination(uri or own.uri, own.experiment, config.run.name, joins)
        folder = run.own_folder(run.tracking.name) / f"eval-{_stamp()}"
        return cls(folder, target, f"fovea mlflow sync {directory}", log=log, refusal=refusal)

    @classmethod
    def of_weights(cls, name: str, config: Config, uri: str | None, *, log: Log) -> Self | None:
        """Reporter for pretrained weights; ``None`` if no server is given.

        Args:
            name: name of the weights.
            config: settings of the data and the evaluators.
            uri: the MLflow server.
            log: receives messages.
        """
        if uri is None:
            return None
        check_address(uri, where="--track")
        title = f"eval-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-') or 'weights'}"
        run = RunDirectory(Path("runs/evaluations") / f"{title}-{_stamp()}")
        target = EvalDestination(uri, destination(config.tracking, run.path).experiment, title)
        settings = config.replace(
            run=config.run.model_copy(update={"name": title}), tracking=config.tracking.model_copy(update={"uri": uri})
        )
        run.write_settings(settings)  # for `fovea mlflow sync`
        params = {key: value for key, value in flatten(config).items() if key.startswith(("evaluation.", "data.shards"))}
        return cls(run.tracking / "eval", target, f"fovea mlflow sync {run.path}", log=log, params={"weights": name, **params})

    def __call__(self, step: int, scores: Mapping[str, float], file: Path | None = None) -> None:
        """Report scores.

        Args:
            step: the checkpoint's step.
            scores: by metric.
            file: the same as JSON, kept as an artifact.
        """
        if self._journal is None:
            self._journal = self._destination.begin(self._folder)
            if self._refusal:
                self._log(f"the scores stay in {self._folder}: {self._refusal}")
            else:
                self._shipper = self._destination.shipper(self._folder, self._log)
                self._shipper.start()
            if self._params:
                self._journal.params(self._params)
        self._journal.metrics(step, {f"eval/{name}": value for name, value in scores.items()})
        if file is not None:
            self._journal.artifact(self._inside_run(file))

    def _inside_run(self, file: Path) -> Path:
        """The file, or its copy beside the journal if it is outside the run: only files of the run are sent."""
        root, file = self._folder.parent.parent.resolve(), file.resolve()
        if file.is_relative_to(root):
            return file
        return Path(shutil.copyfile(file, self._folder.resolve() / file.name))

    def close(self) -> None:
        """Send the rest, within half a minute."""
        if self._journal is None:
            return
        if not self._destination.joins:
            self._journal.tags({"fovea.state": "finished"})
        self._journal.close()
        if self._shipper is not None and not self._shipper.close(_PATIENCE):
            server = shown_server(self._destination.uri)
            self._log(f"MLflow at {server} has not taken everything; later, `{self._hint}` sends the rest")


def _stamp() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
