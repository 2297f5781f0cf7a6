"""Runs ``fovea embed``: starts its ranks, submits a job, or is one of the ranks of a job (``launch.cli.embed_ranks JOB``)."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from launch.cli.eval_ranks import ranks_for, spread, world_here
from launch.progress import progress_bar
from launch.rank_environment import RankEnvironment
from pipeline.config.schema import Config
from pipeline.config.sizes import Size
from pipeline.config.types import absolute_paths
from pipeline.data.settings import DataSettings
from pipeline.errors import ConfigError, FoveaError, failure_fields
from pipeline.runtime import failure_claim as claims
from pipeline.runtime import job_record as record
from pipeline.runtime.clock import clock
from pipeline.runtime.interpreter import end_process
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import printable

if TYPE_CHECKING:
    from pipeline.evaluation.embedding import EmbedRequest, EmbedResult
    from pipeline.evaluation.embedding_worker import EmbedProgress

_EVERY = 10.0  # seconds between two lines of progress
_STOPPED = 3  # exit code: stopped before the end, the same command continues


@dataclass(frozen=True)
class EmbedOptions:
    """The command line of ``fovea embed``.

    Attributes:
        shards: pattern of the shards.
        out: the folder of embeddings.
        pooling: ``cls``, ``mean`` or ``patches``.
        patches: patch tokens of each image.
        dtype: ``fp16`` or ``fp32``.
        size: side, or height and width, of the images in pixels.
        batch_size: images of a forward pass.
        model: timm architecture name of a weights file.
        ranks: number of processes.
        overwrite: replace embeddings that are there.
        cluster: name of a cluster profile to submit a job to.
    """

    shards: str
    out: Path
    pooling: str = "cls"
    patches: int = 16
    dtype: str = "fp16"
    size: Size | None = None
    batch_size: int | None = None
    model: str | None = None
    ranks: int | None = None
    overwrite: bool = False
    cluster: str = ""


def run(target: str, overrides: Sequence[str], options: EmbedOptions, command: Sequence[str]) -> int:
    """Embed, or submit a job that does; returns the exit code.

    Args:
        target: a run, one of its checkpoints, or pretrained weights.
        overrides: ``KEY=VALUE`` settings.
        options: the rest of the command line.
        command: the whole command line after ``fovea``, for the ranks.

    Raises:
        FoveaError: weights, shards or a folder that cannot be used.
    """
    from pipeline.evaluation import embedding

    profile = [text.removeprefix("cluster.") for text in overrides if text.startswith("cluster.")]
    if profile and not options.cluster:
        raise ConfigError("is for a job on a cluster", where=f"cluster.{profile[0]}", hint="Give --cluster too, or leave it out")
    config, request = _request(target, [text for text in overrides if not text.startswith("cluster.")], options)
    here = RankEnvironment.read()
    if options.cluster:
        if here.source != "single":
            raise ConfigError("a rank submits no job", where="--cluster", hint="Leave it out within a job")
        return _submit(request, config, options, profile)
    if (count := ranks_for(config, options.ranks)) > 1:
        embedding.check_request(request, config)
        return spread(command, count, None)
    return _attended(request, config, here)


def _submit(request: EmbedRequest, config: Config, options: EmbedOptions, profile: list[str]) -> int:
    """Submit a job whose ranks find everything by absolute paths, and a run's checkpoint although the run goes on."""
    from launch.slurm.embed_job import submit
    from pipeline.data.embeddings import document
    from pipeline.evaluation.embedding import check_request
    from pipeline.weights.from_checkpoint import named_or_newest

    folder = request.directory.absolute()
    for pattern in config.data.shards:
        if "://" not in pattern and not os.path.isabs(pattern):
            hint = "Submit from a folder without * ? [ ] { } in its name, or give an absolute path"
            where = printable(str(Path.cwd()))
            raise ConfigError(
                f"{printable(pattern)} is relative to a folder whose name reads as a pattern", where=where, hint=hint
            )
    check_request(request, config)
    if not options.overwrite and (folder / document.FILE).exists():
        hint = "Choose another --out, or replace the embeddings that are there with --overwrite"
        raise ConfigError("is complete already", where=str(folder), hint=hint)
    run = request.run.absolute() if request.run is not None else None
    checkpoint = named_or_newest(run, request.checkpoint).path.absolute() if run is not None else None
    fixed = replace(request, directory=folder, run=run, checkpoint=checkpoint, overwrite=False)
    done = submit(fixed, config, options.cluster, profile, overwrite=options.overwrite)
    print(f"job {done.job}\nrecords {done.folder}\nlog {done.folder / 'logs'}")
    return 0


def _request(target: str, overrides: Sequence[str], options: EmbedOptions) -> tuple[Config, EmbedRequest]:
    """The settings, and what to embed.

    Raises:
        ConfigError: there is neither a run nor weights, or settings are invalid.
    """
    from pipeline.config.load import load
    from pipeline.data.embeddings.work import check_directory
    from pipeline.evaluation.embedding import EmbedRequest
    from pipeline.evaluation.standalone import settings_for_weights

    path = Path(target).absolute()
    checkpoint = path if path.name.startswith("step_") and (path.parent.parent / "config.yaml").is_file() else None
    directory = checkpoint.parent.parent if checkpoint is not None else Path(target)
    of_run = (directory / "config.yaml").is_file()
    if not of_run and not directory.exists() and ":" not in target:
        raise ConfigError(
            "is neither a run nor weights", where=target, hint="Name a run, a checkpoint, a weights file or folder, or timm:NAME"
        )
    if repeated := [text for text in overrides if text.partition("=")[0] in ("data.shards", "data.sources")]:
        raise ConfigError("is given by SHARDS here", where=repeated[0], hint="Leave it out")
    if of_run and options.model is not None:
        raise ConfigError("is for a weights file; a run knows its model", where="--model", hint="Leave it out")
    if of_run:
        config = load(str(directory / "config.yaml"), overrides).config
    else:
        config = settings_for_weights([*overrides, "data.shards=none.tar"])
    config = config.replace(data=_of_shards(config.data, options.shards))
    if options.pooling != "patches" and options.patches != 16:
        raise ConfigError(f"is for --pooling patches, not {options.pooling}", where="--patches", hint="Leave it out")
    check_directory(options.out)
    request = EmbedRequest(
        directory=options.out,
        source=os.path.abspath(target) if Path(target).exists() else target,  # the same from every folder
        run=directory if of_run else None,
        checkpoint=checkpoint,
        pooling=cast(Literal["cls", "mean", "patches"], options.pooling),
        patches=options.patches,
        dtype="float16" if options.dtype == "fp16" else "float32",
        size=options.size,
        batch_size=options.batch_size or config.evaluation.knn.batch_size,
        timm_name=options.model,
        overwrite=options.overwrite,
    )
    return config, request


def _of_shards(data: DataSettings, pattern: str) -> DataSettings:
    """The settings with other shards: not by an override, since a run's own settings may evaluate on these."""
    try:
        return absolute_paths(DataSettings.model_validate({**data.model_dump(), "shards": pattern, "sources": None}))
    except ValueError as error:
        raise ConfigError(
            "must be a path or URL", where=printable(pattern, limit=200), hint="Name shards, such as '*.tar'"
        ) from error


def _attended(request: EmbedRequest, config: Config, here: RankEnvironment, job: RunDirectory | None = None) -> int:
    """Embed as one rank; of a Slurm job, record failures, heartbeats and the outcome where its supervisor reads them."""
    attended = os.environ.get("FOVEA_ATTEMPT")
    if job is None or attended is None:
        return _embed(request, config, here, _Stops(None, 0))
    attempt = int(attended)
    try:
        return _embed(request, config, here, _Stops(job, attempt))
    except (FoveaError, OSError, RuntimeError, MemoryError) as error:
        what = str(error) or type(error).__name__
        code = error.exit_code if isinstance(error, FoveaError) else 1
        own = {"rank": here.rank, "what": what[:1000], "code": code, "step": 0, **failure_fields(error)}
        claims.claim(job.logs(attempt), own)
        raise


def _embed(request: EmbedRequest, config: Config, here: RankEnvironment, stops: _Stops) -> int:
    from pipeline.evaluation.embedding import embed

    stops.listen()
    with world_here(config) as world, _shown(here.rank) as report, stops.heartbeats(world.rank, world.size):

        def on_progress(now: EmbedProgress) -> None:
            report(now)
            stops.note(now)

        result = embed(request, config, world, report=on_progress, stopping=stops.requested)
    if here.rank == 0:
        stops.outcome(result)
        _print(request, result)
    return _STOPPED if result.state == "stopped" and not stops.of_job else 0


def _print(request: EmbedRequest, result: EmbedResult) -> None:
    where = printable(str(request.directory))
    if result.state == "stopped":
        print(f"fovea: stopped; the same command continues {where}", file=sys.stderr, flush=True)
        return
    assert result.document is not None
    counts = result.document.counts
    spec = result.document.spec
    if result.state == "complete":
        print(f"{where} is complete already: {counts['rows']:,} embeddings of {counts['embedded']:,} images; nothing was done")
        return
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in result.reasons.most_common())
    bad = f"; {counts['bad']:,} could not be used ({reasons}), see {where}/bad_samples.jsonl" if counts["bad"] else ""
    rate = result.embedded / max(result.seconds, 1e-9)
    print(
        f"embedded {counts['embedded']:,} of {counts['samples']:,} images as {counts['rows']:,} x {spec.dim} {spec.dtype} in "
        f"{len(result.document.shards):,} files{bad}\n"
        f"{result.embedded:,} images in {clock(result.seconds)}, {rate:,.0f} images/s\n{where}"
    )


@contextlib.contextmanager
def _shown(rank: int) -> Iterator[_Display]:
    if rank:
        yield _Display(None)
        return
    with progress_bar("embedding") as bar:
        yield _Display(bar)


class _Display:
    """Shows the progress of all ranks: a bar on a terminal, else a line from time to time."""

    def __init__(self, bar: object) -> None:
        self._bar, self._shown = bar, time.monotonic()

    def __call__(self, now: EmbedProgress) -> None:
        if not callable(self._bar):
            return
        line = ""
        due = time.monotonic() - self._shown
        if due > (0.5 if sys.stderr.isatty() else _EVERY):
            self._shown = time.monotonic()
            left = clock((now.total - now.done) / now.rate) if now.rate else "?"
            line = f"{now.rate:,.0f} img/s" + (f", {now.bad:,} bad" if now.bad else "") + f", left {left}"
        self._bar(now.done, now.total, line)


class _Stops:
    """Requests to stop, by signal or by the files of a Slurm job, and the records that its supervisor reads.

    Args:
        job: records of the Slurm job; ``None`` without one.
        attempt: its attempt.
    """

    def __init__(self, job: RunDirectory | None, attempt: int) -> None:
        self._job, self._attempt = job, attempt
        self._looked, self._noted, self._done, self._total = 0.0, 0.0, 0, 0
        self._reason = ""

    @property
    def of_job(self) -> bool:
        """Whether a supervisor decides what happens next."""
        return self._job is not None

    def listen(self) -> None:
        """Let signals stop the work after the batch."""
        from pipeline.runtime.stop_requests import StopRequests

        requests = StopRequests()
        requests.listen()
        self._requests = requests

    @contextlib.contextmanager
    def heartbeats(self, rank: int, size: int) -> Iterator[None]:
        """Send heartbeats and end a rank that hangs, in a Slurm job."""
        if self._job is None:
            yield
            return
        from pipeline.runtime.watchdog import Watchdog

        self._dog = Watchdog(self._job.logs(self._attempt), rank, size)
        self._dog.start()
        try:
            yield
        finally:
            self._dog.stop()

    def requested(self) -> bool:
        """Whether to stop now."""
        from pipeline.runtime.stop_requests import Stop
        from pipeline.runtime.watchdog import EVALUATE

        if self._requests.requested is not Stop.NO:
            self._reason = self._reason or self._requests.requested.name
        if self._job is None:
            return bool(self._reason)
        self._dog.enter(EVALUATE, self._done)
        if not self._reason and time.monotonic() - self._looked > 1.0:
            self._looked = time.monotonic()
            if record.pending_request(self._job, f"{record.STOP}-{self._attempt}") is not None:
                self._reason = "PREEMPTED"
            elif record.pending_request(self._job, record.STOP) is not None:
                self._reason = "USER_REQUEST"
        return bool(self._reason)

    def note(self, now: EmbedProgress) -> None:
        """Record the progress of the first rank's Slurm job: its budgets count attempts without any."""
        self._done, self._total = now.done, now.total
        if self._job is not None and time.monotonic() - self._noted > 2.0:
            self._noted = time.monotonic()
            self._write()

    def _write(self) -> None:
        if self._job is not None:
            with contextlib.suppress(OSError):
                self._job.write(record.WORK, {"done": self._done, "total": self._total})

    def outcome(self, result: EmbedResult) -> None:
        """Record how the attempt ended."""
        if self._job is None:
            return
        if result.document is not None:
            self._done = self._total = result.document.counts["samples"]
        self._write()
        stop = (self._reason or "SIGTERM") if result.state == "stopped" else "FINISHED"
        outcome = {"stop": stop, "step": self._done, "steps": self._total, "attempt": self._attempt}
        self._job.write("outcome.json", outcome)


def main() -> int:
    """Entry of the ranks of a Slurm job: ``python -m launch.cli.embed_ranks JOB``."""
    from launch.slurm.embed_job import read_request
    from launch.streams import open_streams
    from launch.terminal import clean_logs
    from pipeline.errors import of_system

    open_streams()
    clean_logs()
    folder = Path(sys.argv[1])
    try:
        request, config = read_request(folder)
        return _attended(request, config, RankEnvironment.read(), RunDirectory(folder))
    except FoveaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        known = of_system(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr, flush=True)
        return known.exit_code


if __name__ == "__main__":
    end_process(main())
