"""Starts the ranks of ``fovea eval`` and sends their scores to MLflow."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import local
from launch.rank_environment import RankEnvironment, ranks_to_start
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.runtime.interpreter import module_command
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.mlflow_servers import shown_server
from pipeline.untrusted import printable

if TYPE_CHECKING:
    from pipeline.runtime.process_group import World
    from pipeline.tracking import EvalDestination, Journal, Shipper

Scores = Mapping[str, Mapping[str, float]]
"""Scores by metric name, for each of ``trained``, ``untrained``, ``weights``…"""
_OWN = ("trained", "weights")
_PATIENCE = 30.0  # seconds to flush to MLflow at the end


def many(config: Config, ranks: int | None) -> int:
    """Number of ranks to start here: as requested, else one per GPU; 1 if this process is a rank already.

    Raises:
        LaunchError: the request contradicts the launcher that started this process, or there are fewer GPUs.

    Args:
        config: the settings; with gloo no GPU is used.
        ranks: the requested number.
    """
    return ranks_to_start(RankEnvironment.read(), ranks, where="--ranks", on_cpu=config.launch.backend == "gloo") or 1


def spread(words: Sequence[str], ranks: int, logs: Path | None) -> int:
    """Run the same command on several ranks of this host; returns the exit code.

    Args:
        words: the command line after ``fovea``.
        ranks: number of ranks.
        logs: log directory of all ranks but the first; by default a temporary one that is kept only after a failure.
    """
    folder = logs or Path(tempfile.mkdtemp(prefix="fovea-eval-"))
    code = local.start(module_command("launch.cli.main", *words), ranks, log_directory=folder)
    if logs is None and code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return code


@contextlib.contextmanager
def world_here(config: Config) -> Iterator[World]:
    """The process group of all ranks on which this command was started; of this process alone without a launcher.

    Args:
        config: the settings; with ``launch.backend=gloo`` no GPU is used.
    """
    from pipeline.runtime.process_group import join, leave

    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
    here = RankEnvironment.read()
    alone = here.world_size == 1
    world = join(
        rank=here.rank,
        size=here.world_size,
        local_rank=here.local_rank,
        address="127.0.0.1" if alone else here.address,
        port=here.port,
        key=secrets.token_hex(8) if alone else here.key,
        backend=config.launch.backend,
        timeout=config.launch.timeout,
        local_size=here.local_world_size,
    )
    whole = False
    try:
        yield world
        whole = True
    finally:
        if whole or alone:  # the others may be anywhere: a failed rank does not wait for them
            leave()


class EvalReporter:
    """Sends scores to MLflow through a journal, so that an unreachable server neither blocks nor loses anything.

    A run's scores are logged to the run's own MLflow run as ``eval/<score>`` at the checkpoint's step, those of another network
    (untrained, raw pixels) as ``eval/<whose>/<score>``. Pretrained weights, and runs that are sent to another server than their
    own, get a separate MLflow run.

    Args:
        folder: for journal and cursor, created with the first scores.
        aside: where the journal is sent.
        hint: command that sends the rest later.
        params: settings to log first.
        refusal: why nothing is sent now; the journal is kept nevertheless.
    """

    def __init__(
        self, folder: Path, aside: EvalDestination, hint: str, params: Mapping[str, Any] | None = None, refusal: str = ""
    ) -> None:
        self._folder, self._aside, self._hint, self._params, self._refusal = folder, aside, hint, params, refusal
        self._journal: Journal | None = None
        self._shipper: Shipper | None = None

    @classmethod
    def of_run(cls, directory: Path, config: Config, uri: str | None) -> EvalReporter | None:
        """Reporter for a run's checkpoints.

        Args:
            directory: the run.
            config: its settings.
            uri: an MLflow server other than the run's own.

        Returns:
            ``None`` if the run is not tracked and no server is given.
        """
        from pipeline.tracking import EvalDestination, destination, destination_of

        run, t = RunDirectory(directory), config.tracking
        own = destination(t, run.path)
        if uri is None and not t.enabled:
            return None
        joins = "../cursor.json" if t.enabled and uri in (None, own.uri) else ""
        hint = f"fovea mlflow sync {directory}"
        try:
            destination_of(t, run.path, named=uri)
            refusal = ""
        except ConfigError as error:
            refusal = str(error)
        aside = EvalDestination(uri or own.uri, own.experiment, config.run.name, joins)
        return cls(run.tracking / f"eval-{_stamp()}", aside, hint, refusal=refusal)

    @classmethod
    def of_weights(cls, name: str, config: Config, uri: str | None) -> EvalReporter | None:
        """Reporter for pretrained weights; ``None`` if no server is given.

        Args:
            name: name of the weights.
            config: settings of the data and the evaluators.
            uri: the MLflow server.
        """
        if uri is None:
            return None
        from pipeline.config.load import flatten
        from pipeline.tracking import EvalDestination, check_address, destination

        check_address(uri, where="--track")

        title = f"eval-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-') or 'weights'}"
        run = RunDirectory(Path("runs/evaluations") / f"{title}-{_stamp()}")
        aside = EvalDestination(uri, destination(config.tracking, run.path).experiment, title)
        chosen = config.replace(
            run=config.run.model_copy(update={"name": title}), tracking=config.tracking.model_copy(update={"uri": uri})
        )
        run.write_settings(chosen)  # for `fovea mlflow sync`
        wanted = {key: value for key, value in flatten(config).items() if key.startswith(("evaluation.", "data.shards"))}
        return cls(run.tracking / "eval", aside, f"fovea mlflow sync {run.path}", {"weights": name, **wanted})

    def __call__(self, step: int, scores: Scores, file: Path | None = None) -> None:
        """Report scores.

        Args:
            step: the checkpoint's step.
            scores: by evaluated network and metric.
            file: the same as JSON, kept as an artifact.
        """
        if self._journal is None:
            self._journal = self._aside.begin(self._folder)
            if self._refusal:
                print(f"fovea: the scores stay in {self._folder}: {printable(self._refusal)}", file=sys.stderr)
            else:
                self._shipper = self._aside.shipper(
                    self._folder, lambda text: print(f"fovea: {printable(text)}", file=sys.stderr)
                )
                self._shipper.start()
            if self._params:
                self._journal.params(self._params)
        values: dict[str, float] = {}
        for whose, row in scores.items():
            prefix = "eval/" if whose in _OWN else f"eval/{whose}/"
            values |= {prefix + name: value for name, value in row.items()}
        self._journal.metrics(step, values)
        if file is not None:
            self._journal.artifact(self._kept(file))

    def _kept(self, file: Path) -> Path:
        """The file, or its copy beside the journal if it is outside the run: only files of the run are sent."""
        root, file = self._folder.parent.parent.resolve(), file.resolve()
        if file.is_relative_to(root):
            return file
        return Path(shutil.copyfile(file, self._folder.resolve() / file.name))

    def close(self) -> None:
        """Send the rest, within half a minute."""
        if self._journal is None:
            return
        if not self._aside.joins:
            self._journal.tags({"fovea.state": "finished"})
        self._journal.close()
        if self._shipper is not None and not self._shipper.close(_PATIENCE):
            where = shown_server(self._aside.uri)
            print(f"fovea: MLflow at {where} has not taken everything; later, `{self._hint}` sends the rest", file=sys.stderr)


@contextlib.contextmanager
def closing(telling: EvalReporter | None) -> Iterator[EvalReporter | None]:
    """Close the reporter at the end, if there is one."""
    try:
        yield telling
    finally:
        if telling is not None:
            telling.close()


def _say(text: str) -> None:
    print(f"fovea: {printable(text)}", file=sys.stderr)


def _stamp() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def agreed(found: Iterator[Any], world: World) -> Iterator[Any]:
    """Broadcast the items of rank 0 to all ranks. ``None`` items are heartbeats and are skipped.

    Args:
        found: iterated on rank 0 only.
        world: this rank's position in the process group.
    """
    import torch.distributed as dist

    while True:
        word: list[Any] = ["", None]
        if world.rank == 0:
            try:
                word = ["found", next(found)]
            except StopIteration:
                word = ["end", None]
        dist.broadcast_object_list(word, src=0, group=world.control)
        if word[0] == "end":
            return
        if word[1] is not None:
            yield word[1]
