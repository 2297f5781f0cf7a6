"""``fovea train``: checks the configuration and data, then starts the ranks or runs as one of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from launch import preload
from launch.rank_environment import RankEnvironment, ranks_to_start
from launch.streams import outlive_terminal
from pipeline.config.load import Loaded, show, stored_run
from pipeline.config.validate import check_devices, check_ranks
from pipeline.errors import ConfigError, LaunchError
from pipeline.masking import shown
from pipeline.runtime import job_record as record
from pipeline.runtime.gpus import gpus
from pipeline.runtime.locks import lock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.runtime.startup_phases import StartupPhases, process_begin
from pipeline.tracking.trackers import check_installed


@contextlib.contextmanager
def alone(run: RunDirectory) -> Iterator[None]:
    """Hold the run's lock, so that a run directory has at most one live attempt.

    Raises:
        LaunchError: another attempt holds the lock.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / ".lock").open("a") as file:
        try:
            lock(file.fileno(), file.name, wait=False)
        except BlockingIOError:
            raise LaunchError(
                "another attempt of this run is running",
                where=str(run.path),
                hint="Wait for it, stop it, or choose another run.directory",
            ) from None
        yield


def _indexing(done: int, total: int, shard: Any) -> None:
    bad = {status: count for status, count in getattr(shard, "counts", {}).items() if status != "ok" and count}
    note = f"  {bad}" if bad else ""
    if bad:
        print(f"indexed {done}/{total} shards{note}", file=sys.stderr, flush=True)


def run(loaded: Loaded) -> int:
    """Train; returns the exit code.

    Raises:
        FoveaError: a problem that can be detected before a process group exists.
    """
    config = loaded.config
    startup = StartupPhases("launcher", process_begin())
    startup.mark("settings")
    outlive_terminal()
    here = RankEnvironment.read()
    default = loaded.nobodys_choice("launch.num_processes")
    ranks = ranks_to_start(
        here, config.launch.num_processes, where="launch.num_processes", on_cpu=config.launch.backend == "gloo", default=default
    )
    if default and config.launch.num_processes != (ranks or here.world_size):
        config = config.replace(launch=config.launch.model_copy(update={"num_processes": ranks or None}))
    check_installed(config.tracking)
    if not ranks:
        from launch.rank_main import be_rank

        return be_rank(config, here)
    if broken := check_ranks(config, ranks):
        raise ConfigError(broken[0][1])
    if broken := check_devices(config, on_gpu=config.launch.backend != "gloo" and bool(gpus())):
        raise ConfigError(broken[0][1])
    directory = RunDirectory(config.run.folder)
    with alone(directory), contextlib.ExitStack() as stack:
        if (server := preload.rank_server(config, ranks)) is not None:
            stack.callback(server.close)
        # While it imports torch, this process imports the rest and checks the data.
        from launch import send_end
        from launch.cli import restarts
        from launch.resume import check_identity, choose_checkpoint
        from pipeline.data.inputs import prepare

        if directory.config.exists():
            check_identity(config, directory.settings_document(), directory.config)
        startup.mark("imports")
        inputs = prepare(config, ranks, _indexing)
        startup.mark("index")
        checkpoint, complaints = choose_checkpoint(config, directory, inputs)
        for complaint in complaints:
            print(shown(complaint), file=sys.stderr)
        if checkpoint is None and (config.init_from.source is not None or config.method.anchors):
            from pipeline.weights import init_from as initial

            initial.check(config)
        directory.write_settings(config, show(loaded, secrets=True, absolute=True))
        attempt, code = restarts.attend(config, directory, ranks, checkpoint, inputs, server=server, startup=startup)
        _notify(loaded, directory, attempt, code)
        if code and config.tracking.enabled:
            send_end.send(directory)
    return code


def _notify(loaded: Loaded, run: RunDirectory, attempt: int, code: int) -> None:
    """Notify the user of the end, as the section notify says; a stop by request or signal is none."""
    from launch import notifications

    if not (settings := notifications.choose((loaded.config.notify, stored_run(loaded.source) is None))):
        return
    outcome, failure = record.outcome(run, attempt) or {}, record.failure(run, attempt) or {}
    if code:
        event = "hang" if failure.get("cause") == "hang" else "failed"
        why = str(failure.get("what") or f"the ranks ended with code {code}")
    elif outcome.get("stop") == "FINISHED":
        event, why = "finished", f"all {outcome.get('steps')} steps are done"
    else:
        return
    notifications.notify(settings, event, run.path, *notifications.about(run, event, why))
