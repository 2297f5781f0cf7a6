"""Submits a run to Slurm; detects every problem that can be known before the job waits in the queue."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launch import notifications
from launch.resume import check_identity
from launch.slurm import account_limits, excluded_nodes, limits, render
from launch.slurm import slurm_commands as tools
from launch.slurm.profile import ClusterProfile
from pipeline.checkpoint import catalog
from pipeline.config.load import Loaded, show, stored_run
from pipeline.config.paths import absolute
from pipeline.config.schema import Config
from pipeline.config.types import path_values
from pipeline.config.validate import check_devices, check_ranks
from pipeline.errors import CheckpointError, ConfigError, LaunchError
from pipeline.masking import shown
from pipeline.runtime import job_record as record
from pipeline.runtime.known import digest
from pipeline.runtime.locks import lock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.destination import destination, unanswered
from pipeline.tracking.mlflow_servers import remember
from pipeline.untrusted import printable


@dataclass(frozen=True)
class Submitted:
    """Result of a submission.

    Attributes:
        job: job ID; ``None`` if nothing was submitted.
        run: the run directory.
        script: the batch script's text.
        command: the command that submits it.
        test_output: output of ``sbatch --test-only``, if it was asked for.
    """

    job: int | None
    run: Path
    script: str
    command: list[str]
    test_output: str = ""


def submit(
    loaded: Loaded,
    profile: ClusterProfile,
    *,
    dry: bool = False,
    check: bool = False,
    index: bool = True,
    command: str | None = None,
    named: bool = True,
) -> Submitted:
    """Write the run directory and submit the job.

    Args:
        loaded: the run's settings.
        profile: the cluster.
        dry: write and submit nothing.
        check: return Slurm's estimate of the start; for a dry run, ask Slurm at all.
        index: index the shards now, so that problems are found before the job starts.
        command: the command line as typed.
        named: whether the user named the profile, which otherwise is the one stored in the run.

    Raises:
        ConfigError, DataError, LaunchError: any problem that can be detected before the job runs.
    """
    config = loaded.config
    folder = config.run.folder.absolute()
    _check_patterns(config)
    if "\\" in str(folder):
        raise ConfigError(
            f"{folder} must not contain a backslash",
            where="run.directory",
            hint="Choose another: with a backslash, Slurm leaves the job number out of the log's name",
        )
    run = RunDirectory(folder)
    check_all(config, profile, run)
    if index and not dry:
        from pipeline.data.inputs import prepare

        prepare(config, profile.world)
    notify = notifications.choose((config.notify, stored_run(loaded.source) is None), (profile.notify, named))
    os.environ.pop(notifications.VARIABLE, None)
    if notify:  # the job inherits it; the run directory, which might be another user's, does not hold it
        os.environ[notifications.VARIABLE] = digest(notifications.canonical(notify))
    typed = shown(command or " ".join(["fovea", *sys.argv[1:]]))  # masked, since others can read these files
    script = record.script(run)
    if dry:
        text = render.script(config, profile, folder, command=typed, code_state=render.code_state())
        argv = ["sbatch", "--parsable", str(script)]
        if check:
            possible(profile)
        return Submitted(None, folder, text, argv, _test(text, []) if check else "")
    available = possible(profile)
    away, forgiven = excluded_nodes.avoid(run, render.facts(config, profile, folder))
    if forgiven:
        print(f"fovea: not excluded, since too few nodes would be left: {', '.join(forgiven)}", file=sys.stderr)
    if config.launch.restarts and config.checkpoint.snapshot_every and not render.snapshots_of(config, profile):
        print(
            "fovea: no snapshots are taken in a container: restarts continue from checkpoints",
            file=sys.stderr,
        )
    _note_tracking(loaded)
    options = [f"--exclude={','.join(away)}"] if away else []
    text = render.script(config, profile, folder, command=typed, code_state=render.code_state())
    estimate = _test(text, options) if check else ""
    is_new = not run.config.exists()
    try:
        job = hand_in(
            run, render.facts(config, profile, run.path, notify), text, typed, options, partial(_write_settings, loaded)
        )
    except OSError as error:
        reason = error.strerror or "some files could not be copied; is the disk full?"
        raise LaunchError(
            f"the run's directory cannot be written ({reason})",
            where=str(folder),
            hint="Free space, or choose another run.directory",
        ) from error
    except AlreadySubmitted:
        raise
    except LaunchError as error:
        if is_new:  # refused: no run that `fovea runs` would list
            _remove_refused(run)
        hint = f"Change the cluster profile; available is {available}" if available is not None else error.hint
        raise LaunchError(error.what, where=error.where, hint=hint) from error
    return Submitted(job, folder, text, ["sbatch", "--parsable", *options, str(script)], estimate)


def hand_in(
    run: RunDirectory,
    facts: dict[str, Any],
    text: str,
    typed: str,
    options: list[str],
    write_settings: Callable[[RunDirectory], None],
) -> int:
    """Write everything, then submit: if the directory cannot be written, no job is submitted; returns the job's number.

    Args:
        run: the run directory.
        facts: for the supervisor.
        text: the batch script.
        typed: the command line, masked.
        options: of ``sbatch``.
        write_settings: writes what the ranks read.

    Raises:
        LaunchError: Slurm refuses the job, or another job of the run is running or pending.
    """
    script = record.script(run)
    _made(script).parent.mkdir(parents=True, exist_ok=True)
    with (script.parent / "lock").open("w") as file:
        try:
            lock(file.fileno(), file.name, wait=False)
        except BlockingIOError as error:
            raise AlreadySubmitted(
                "another process is submitting this run", where=str(run.path), hint=f"See it with `fovea status {run.path}`"
            ) from error
        refuse_living(run)
        render.snapshot(run.path / "code")
        (run.path / "logs").mkdir(exist_ok=True)
        script.write_text(text)
        (script.parent / "command.txt").write_text(typed + "\n")
        write_settings(run)
        record.clear(run)
        run.write("submit/job.json", facts)
        job = tools.submit(script, *options)
        earlier = [other for other in living(run) if other.id < job]
        if earlier:  # submitted at the same time, on a file system without locks
            tools.cancel(job)
            run.write("submit/job.json", {**facts, "job": earlier[0].id})
            raise AlreadySubmitted(
                f"job {earlier[0].id} of this run was submitted at the same time",
                where=str(run.path),
                hint=f"See it with `fovea status {run.path}`",
            )
        run.write("submit/job.json", {**facts, "job": job})
        run.note("submit", job=job)
    return job


def _note_tracking(loaded: Loaded) -> None:
    """Print whether the tracking server answers; not for a run directory's own settings, which may be another user's."""
    tracking = loaded.config.tracking
    if not tracking.enabled or "mlflow" not in tracking.to or stored_run(loaded.source) is not None:
        return
    target = destination(tracking, Path(os.devnull))  # what the user names now, and not what a run directory does
    if target.origin and (why := unanswered(target.uri)):
        print(
            f"fovea: MLflow at {target} does not answer from here ({why}); the run trains anyway, and "
            "`fovea mlflow sync` sends its journal later",
            file=sys.stderr,
        )


def _write_settings(loaded: Loaded, run: RunDirectory) -> None:
    config = loaded.config
    run.write_settings(config, show(Loaded(config, loaded.provenance, loaded.source), secrets=True, absolute=True))
    if config.tracking.uri:
        remember(config.tracking.uri)


class AlreadySubmitted(LaunchError):
    """Another submission of the same run came first."""


def _remove_refused(run: RunDirectory) -> None:
    """Remove what a refused submission has written into a new run's directory."""
    if living(run):
        return
    for name in ("config.json", "config.yaml"):
        (run.path / name).unlink(missing_ok=True)
    for name in ("code", "submit"):
        shutil.rmtree(run.path / name, ignore_errors=True)
    for folder in (run.path / "logs", run.path):
        with contextlib.suppress(OSError):  # holds something else
            folder.rmdir()


def check_all(config: Config, profile: ClusterProfile, run: RunDirectory) -> None:
    """Check whether this run can be submitted to this cluster.

    Raises:
        ConfigError: the batch cannot be divided among the ranks, or the run directory is not shared between nodes.
        CheckpointError: the directory belongs to a run with other settings, or holds checkpoints that must not be continued.
        LaunchError: a job of this run is running or pending.
    """
    if broken := check_ranks(config, profile.world):
        raise ConfigError(
            broken[0][1], hint=f"Match the cluster profile's {profile.world} ranks: {profile.nodes} x {profile.tasks_per_node}"
        )
    if broken := check_devices(config, on_gpu=profile.gpus_per_node > 0 and config.launch.backend != "gloo"):
        raise ConfigError(broken[0][1], where=broken[0][0])
    local = [path for path in profile.local_paths if run.path.is_relative_to(path)]
    if profile.nodes > 1 and local:
        raise ConfigError(
            f"{run.path} is on a disk of one machine only",
            where="run.directory",
            hint=f"Choose a folder on shared storage; {local[0]} is among local_paths of the cluster profile",
        )
    if run.config.exists():
        check_identity(config, run.settings_document(), run.config)
    if (over := record.final_state(run)).get("state") == "finished":
        raise LaunchError(f"the run is finished: {over['why']}", where=str(run.path), hint="Choose another run.name")
    refuse_living(run)
    if config.checkpoint.resume == "never" and catalog.rows(run.checkpoints):
        raise CheckpointError(
            "checkpoint.resume=never, but the run has checkpoints",
            where=str(run.checkpoints),
            hint="Choose another run.directory, or checkpoint.resume=auto to resume",
        )


def refuse_living(run: RunDirectory) -> None:
    """Refuse a run that has a running or pending job.

    Raises:
        AlreadySubmitted: with the job.
    """
    if alive := living(run):
        raise AlreadySubmitted(
            f"job {alive[0].id} of this run is {alive[0].state.lower()}",
            where=str(run.path),
            hint=f"See it with `fovea status {run.path}`, or stop it with `fovea stop {run.path}`",
        )


def _check_patterns(config: Config) -> None:
    """Refuse shard patterns that the job, which works in the run directory, would not find.

    Raises:
        ConfigError: a relative pattern, in a working directory whose own name would be read as a pattern.
    """
    for key, value in path_values(config).items():
        for text in value if isinstance(value, tuple) else (str(value),):
            if absolute(text, "patterns", "/") != text and isinstance(value, tuple):
                raise ConfigError(
                    f"{printable(text)} is relative to {printable(str(Path.cwd()))}, whose name reads as a pattern",
                    where=key,
                    hint="Submit from a folder without * ? [ ] { } in its name, or give an absolute path",
                )


def living(run: RunDirectory, listed: Sequence[tools.Job] | None = None) -> list[tools.Job]:
    """Running or pending jobs of this run, by number; running ones first.

    Args:
        run: the run directory.
        listed: the queue entries of this user, if they are known; otherwise Slurm is asked for those of the run's owner.

    Raises:
        LaunchError: the run was submitted to Slurm, and Slurm does not answer.
    """
    named = [record.read(run.path / name).get("job") for name in ("submit/job.json", "live.json", "successor.json")]
    ids = {job for job in named if type(job) is int and 0 < job < 1 << 32}
    try:
        user = record.script(run).stat().st_uid
    except OSError:
        if not ids:
            return []
        user = None
    script = record.script(run)
    own = tools.jobs_of(script, *ids, user=user) if listed is None else tools.of_script(listed, script, *ids)
    return sorted((job for job in own if job.live), key=lambda job: (job.state in tools.WAITING, job.id))


def _made(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot be created ({error.strerror})",
            where=f"run.directory = {path.parent}",
            hint="Choose a directory that you may write to",
        ) from error
    return path


def possible(profile: ClusterProfile) -> limits.Partition | None:
    """The partition in which the job can run; ``None`` if Slurm chooses it.

    Raises:
        LaunchError: the job can never run, or Slurm does not answer.
    """
    available = limits.partition(profile.partition)
    reasons = limits.never_runs(profile, available) if available is not None else []
    refused, note = account_limits.check(profile, available)
    if reasons := [*reasons, *refused]:
        raise LaunchError(
            f"the job can never run: {'; '.join(reasons)}",
            where="cluster profile",
            hint="Change the profile, or override it with cluster.KEY=VALUE"
            + (f". Available is {available}" if available is not None else ""),
        )
    if note:
        print(f"fovea: {note}", file=sys.stderr)
    return available


def _test(text: str, options: list[str]) -> str:
    """Ask Slurm when a script would start; it also refuses while all nodes are away, so that only ``--check`` asks.

    Raises:
        LaunchError: it could not start, or Slurm does not answer.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(text)
        file.flush()
        return tools.test(Path(file.name), *options)
