"""Runs one rank: ``python -m launch.rank_main CONFIG.json ATTEMPT CHECKPOINT``, started by ``fovea train``."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launch import accelerate_environment as accelerate
from launch import host_memory
from launch.progress import TimeLogger, progress_logger
from launch.rank_data import agreed_inputs
from launch.rank_environment import RankEnvironment
from launch.resume import check_identity, choose_checkpoint, chosen_again, copies_of, origins
from launch.streams import outlive_terminal
from pipeline.checkpoint import files as saved
from pipeline.checkpoint.files import Saved
from pipeline.config.load import fingerprint, flatten
from pipeline.config.paths import user_name
from pipeline.config.schema import Config
from pipeline.errors import FoveaError, LaunchError, failure_fields, of_system
from pipeline.masking import hide_secrets, masked, shown
from pipeline.runtime import failure_claim as claims
from pipeline.runtime import job_record as record
from pipeline.runtime.compile_cache import use_compile_cache
from pipeline.runtime.interpreter import end_process
from pipeline.runtime.run_directory import RunDirectory
from pipeline.runtime.startup_phases import StartupPhases
from pipeline.runtime.versions import fovea_version

if TYPE_CHECKING:
    from pipeline.checkpoint.neighbours import NodePlace
    from pipeline.data.inputs import Inputs
    from pipeline.runtime.process_group import World
    from pipeline.runtime.stop_requests import StopRequests
    from pipeline.runtime.watchdog import Watchdog


_PATIENCE = 60.0  # seconds to flush to MLflow after the run is finished


@dataclass(frozen=True)
class RankContext:
    """What a rank has once it has joined the process group.

    Attributes:
        config: the settings.
        world: the process group.
        run: the run directory.
        attempt: number of the attempt.
        checkpoint: the checkpoint to start from.
        inputs: the indexed data, if this rank has prepared them.
        requests: stop requests.
        watchdog: this rank's watchdog, started.
        begin: when the rank began, seconds since 1970.
        alone: no launcher of ours records the attempt's end.
        snapshots: this node's folder in host memory for snapshots, if any are taken or read.
        nodes: this rank's position among several nodes, if they keep snapshots.
        startup: when the phases of the start have ended.
    """

    config: Config
    world: World
    run: RunDirectory
    attempt: int
    checkpoint: Saved | None
    inputs: Inputs | None
    requests: StopRequests
    watchdog: Watchdog
    begin: float
    alone: bool
    snapshots: Path | None
    nodes: NodePlace | None
    startup: StartupPhases


def be_rank(config: Config, here: RankEnvironment) -> int:
    """Run as a rank started by torchrun, accelerate or srun: agree on the attempt and the checkpoint, then train.

    A job's supervisor, which counts the attempts (``FOVEA_ATTEMPT``), reads errors before the rendezvous from files.
    """
    attended = os.environ.get("FOVEA_ATTEMPT")
    attempt = int(attended) if attended else None
    try:
        code = _be_rank(config, here, attempt)
    except FoveaError as error:
        if attempt is not None:
            own = {"rank": here.rank, "what": str(error), "code": error.exit_code, "step": 0, **failure_fields(error)}
            claims.claim(RunDirectory(config.run.folder).logs(attempt), own)
        raise
    if code:
        _leave(code)
    return code


def _be_rank(config: Config, here: RankEnvironment, attempt: int | None) -> int:
    from pipeline.data.inputs import prepare

    accelerate.check(config, here.world_size)
    run = RunDirectory(config.run.folder)
    if run.config.exists():
        check_identity(config, run.settings_document(), run.config)
    first = here.rank == 0
    if first and config.launch.restarts and "FOVEA_ATTEMPT" not in os.environ:
        print(f"launch.restarts has no effect under {here.source}, which starts the ranks itself", file=sys.stderr)
    inputs = prepare(config, here.world_size, reuse=not first)
    checkpoint, choose = None, None
    if first:  # the others start from the same one, and check their data once they agree on it
        if attempt is not None:  # an earlier attempt of this job may have gone further, in host memory
            folder = host_memory.of_this_node(os.environ)
            if here.local_world_size == here.world_size or folder is None:
                checkpoint = chosen_again(config, run, inputs, folder)
            elif host_memory.newest_step(folder) < 0:
                checkpoint = chosen_again(config, run, inputs, None)
            else:  # once the nodes have completed what they have
                choose = partial(chosen_again, config, run, inputs, None)
        else:
            checkpoint, complaints = choose_checkpoint(config, run, inputs)
            for complaint in complaints:
                print(shown(complaint), file=sys.stderr)
    return train(config, here, attempt, checkpoint, inputs, choose=choose)


def _leave(code: int) -> None:
    """Exit without waiting for other ranks or threads after a failure; the others notice the broken connection."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(
    config: Config,
    here: RankEnvironment,
    attempt: int | None,
    checkpoint: Saved | None,
    inputs: Inputs | None = None,
    body: Callable[[RankContext], None] | None = None,
    choose: Callable[[], Saved | None] | None = None,
) -> int:
    """Join the process group, build the trainer, train, and leave.

    Args:
        config: the settings.
        here: this process's rank environment.
        attempt: number of the attempt, or ``None`` to let rank 0 count it.
        checkpoint: the checkpoint to start from.
        inputs: the indexed data, if this rank has prepared them; then the first rank's checkpoint is the one that all start from.
        choose: chooses the checkpoint on the first rank, if no snapshot of several nodes is as new as the newest one on disk.
        body: what is done between joining the process group and leaving it; by default a training run.

    Returns:
        The exit code. Errors after the rendezvous have already been reported.
    """
    begin = time.time()
    startup = StartupPhases.of_rank(os.environ)
    outlive_terminal()
    os.environ.setdefault("USER", user_name())  # torch and others need it, and fail if the user ID has no name
    os.environ.setdefault("OMP_NUM_THREADS", str(config.train.threads or 1))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when it is loaded
    if config.train.compile:
        use_compile_cache(user_name(), here.local_world_size or 1)
    import torch
    import torch.distributed as dist

    from pipeline.runtime import process_group as distributed
    from pipeline.runtime.first_failure import report_failure
    from pipeline.runtime.stop_requests import StopRequests
    from pipeline.runtime.watchdog import Limits, Watchdog

    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
    requests = StopRequests()
    requests.listen()
    if here.source != "torchrun" or attempt is not None:
        torch.set_num_threads(config.train.threads or int(os.environ["OMP_NUM_THREADS"]))
    run = RunDirectory(config.run.folder)
    startup.mark("imports")
    try:
        world = distributed.join(
            rank=here.rank,
            size=here.world_size,
            local_rank=here.local_rank,
            address=here.address,
            port=here.port,
            key=here.key,
            backend=config.launch.backend,
            timeout=config.launch.timeout,
            local_size=here.local_world_size,
        )
    except LaunchError as error:
        if attempt is not None:
            own = {"rank": here.rank, "what": str(error), "code": error.exit_code, "step": 0, **failure_fields(error)}
            claims.claim(run.logs(attempt), own)
        raise
    startup.mark("rendezvous")
    snapshots, nodes = host_memory.of_this_node(os.environ), None
    chosen = [attempt, str(checkpoint.path) if checkpoint else None]
    if inputs is not None:  # no launcher of ours has chosen
        snapshot = None
        if snapshots is not None and world.local_size < world.size:
            snapshot, nodes = _snapshot_of_nodes(config, world, snapshots)
            snapshots = snapshots if nodes is not None else None
        if choose is not None and (snapshot is None or snapshot.step < record.saved_step(run)):
            checkpoint = choose()
            chosen[1] = str(checkpoint.path) if checkpoint else None
        if attempt is None and here.rank == 0:
            chosen[0] = run.next_attempt()
        dist.broadcast_object_list(chosen, group=world.control)
        checkpoint = saved.read(Path(str(chosen[1]))) if chosen[1] else None
        if snapshot is not None and (checkpoint is None or snapshot.step > checkpoint.step):
            checkpoint = snapshot
        if attempt is None and here.rank == 0:
            run.write_settings(config)
            run.note("start", attempt=chosen[0], ranks=world.size, resumed_from=checkpoint.step if checkpoint else None)
    number = int(chosen[0] or 0)
    if world.rank == 0:
        startup.folder = run.logs(number)
        if inputs is not None and "FOVEA_ATTEMPT" not in os.environ:
            record.clear(run)  # started by hand: earlier requests no longer apply; our own launchers have cleared them
        requests.watch(run.path / "control", number)
    health = config.watchdog
    away = config.data.storage.outage_timeout + 60 if any("://" in pattern for pattern in config.data.patterns) else 0.0
    watchdog = Watchdog(
        run.logs(number),
        world.rank,
        world.size,
        Limits(
            factor=health.hang_factor,
            floor=max(health.hang_floor, away),  # storage outages are waited for
            start=health.startup_timeout,
            evaluate=health.evaluation_timeout,
            checkpoint=health.checkpoint_timeout,
        ),
    )
    watchdog.start()
    try:
        act = body or _train
        act(
            RankContext(
                config,
                world,
                run,
                number,
                checkpoint,
                inputs,
                requests,
                watchdog,
                begin,
                attempt is None,
                snapshots,
                nodes,
                startup,
            )
        )
    except Exception as error:
        return report_failure(
            error, watchdog, {"micro_batch": config.train.micro_batch_size or "all", "zero": config.train.zero_stage}
        )
    finally:
        watchdog.stop()
    return 0


def _snapshot_of_nodes(config: Config, world: World, folder: Path) -> tuple[Saved | None, NodePlace | None]:
    """The newest snapshot that several nodes have together, and this rank's position; ``None`` for nodes that take none."""
    from pipeline.checkpoint.neighbours import newest_anywhere, nodes_of

    nodes = nodes_of(world, config.launch.timeout)
    if nodes is None:
        if world.rank == 0:
            print("no snapshots are taken: the ranks are not numbered node by node, equally many on each", file=sys.stderr)
        return None, None
    return newest_anywhere(folder, nodes), nodes


def _train(rank: RankContext) -> None:
    """From joining the process group to leaving it."""
    from pipeline.checkpoint.mirror import Copies
    from pipeline.checkpoint.retention import Retention
    from pipeline.data.indexing import open_storage
    from pipeline.data.order.order import num_streams
    from pipeline.data.selections.file import describe
    from pipeline.runtime import process_group as distributed
    from pipeline.runtime.stop_requests import Stop
    from pipeline.tracking import Journal, JournalShipper, described, destination_of, remember, shippers
    from pipeline.training.build import assemble

    config, world, run, number, checkpoint = rank.config, rank.world, rank.run, rank.attempt, rank.checkpoint
    show = progress_logger(world.rank, config.train.global_batch_size, run.logs(number) / "rank-0.log" if rank.alone else None)
    journal = None
    trackers: list[JournalShipper] = []
    tracked = ""
    if world.rank == 0:
        journal = Journal(run.journal(number))
        journal.params({**flatten(config), "fingerprint": fingerprint(config)})
        journal.tags(
            {"fovea.state": "running", "fovea.attempt": number, "fovea.ranks": world.size, "fovea.run": run.path.resolve()}
        )
        if (run.path / "config.yaml").exists():
            journal.artifact(_shown_settings(run))
        target = None
        if config.tracking.enabled and "mlflow" in config.tracking.to:
            target = destination_of(config.tracking, run.path, trained=True)
            target.record(run.tracking)
            if target.origin:
                remember(target.uri)
        named = described(config.tracking, target)
        tracked = f" · {named}" if named else ""
        trackers = shippers(
            config.tracking,
            run.tracking,
            name=config.run.name,
            destination=target,
            log=show.log,
            sweep=run.sweep if target is not None and target.origin else None,
        )
        for tracker in trackers:
            tracker.start()
    rank.startup.mark("journal")
    inputs = agreed_inputs(config, world, rank.inputs)
    rank.startup.mark("data agreed")
    if journal is not None:
        journal.tags({"fovea.data": inputs.train.fingerprint, "fovea.data_samples": inputs.train.total})
    mirror = copies_of(config)
    copies = None
    if world.rank == 0 and mirror is not None:
        c = config.checkpoint
        every = c.keep_every.steps(inputs.order.samples_per_epoch, config.train.global_batch_size) if c.keep_every else 0
        copies = Copies(mirror, open_storage(config), Retention(c.keep_last, every, c.keep_best), show.log)
        copies.start(saved.committed_checkpoints(run.checkpoints))
    trainer = assemble(
        config,
        inputs,
        world,
        run,
        attempt=number,
        resume=checkpoint,
        manifest_fields={
            "config": masked(config.model_dump(mode="json")),
            "fingerprint": fingerprint(config),
            "run": config.run.name,
            "attempt": number,
            "fovea": fovea_version(),
            "origins": origins(checkpoint, config),
        },
        requests=rank.requests,
        journal=journal,
        logger=show,
        watchdog=rank.watchdog,
        copies=copies,
        snapshots=rank.snapshots,
        last_start=host_memory.LAST_START in os.environ,
        nodes=rank.nodes,
        startup=rank.startup,
    )
    if world.rank == 0:
        total, batch = trainer.plan.steps, config.train.global_batch_size
        parameters = sum(math.prod(shape) for shape in trainer.engine.shapes.values())
        few = f" in {inputs.order.streams} streams" if inputs.order.streams < num_streams(batch, None, 1) else ""
        start = f"resuming at step {trainer.progress.step}" if checkpoint else "starting"
        show.log(
            f"{start} · attempt {number} · {world.size} ranks on {world.device.type} · {parameters / 1e6:.1f} M parameters · "
            f"{inputs.train.total} samples{few} · {total} steps of {batch} · {time.time() - rank.begin:.0f} s to start{tracked}"
        )
        run.write("plan.json", {"steps": total, "selection": describe(config.data.selection_files)})
        run.note("training", attempt=number, step=trainer.progress.step)
        trainer.logger = time_logger = TimeLogger(show, run.logs(number) / "train_seconds.json", lambda: trainer.progress.seconds)
        time_logger.note(trainer.progress.step)
    stop = trainer.run()
    if isinstance(trainer.logger, TimeLogger):
        trainer.logger.note(trainer.progress.step)
    if copies is not None and not copies.close():
        show.log("not all checkpoints are copied yet; the next attempt copies the rest")
    if world.rank == 0 and journal is not None:
        finished = stop is Stop.FINISHED
        journal.tags({"fovea.state": "finished" if finished else "stopped", "fovea.stop": stop.name})
        outcome = {
            "stop": stop.name,
            "step": trainer.progress.step,
            "steps": trainer.plan.steps,
            "attempt": number,
            "samples_seen": trainer.progress.step * config.train.global_batch_size,
            "scores": trainer.progress.scores,
            "skipped": trainer.progress.skipped,
            "seconds": trainer.progress.seconds,
            "data": trainer.data_counts,
        }
        for each in range(world.size):
            if run.bad_samples(each).exists():
                journal.artifact(run.bad_samples(each).resolve())
        journal.close()
        run.write("outcome.json", outcome)
        if finished:
            show.log(f"finished at step {trainer.progress.step}{_scores(trainer.progress.scores)}; results are in {run.path}")
        else:
            show.log(f"stopped by {stop.name} at step {trainer.progress.step}, saved; the same command resumes")
        # A run that was asked to stop must exit soon; a finished one may wait until MLflow's database has been created.
        for one in trackers:
            one.finish()
        end = time.monotonic() + (_PATIENCE if finished else 5.0)
        behind = [one.tracker for one in trackers if not one.close(max(end - time.monotonic(), 0.0))]
        if behind:
            rest = (
                f"`fovea mlflow sync {shlex.quote(str(run.path))}` sends the rest"
                if finished
                else "the next attempt sends the rest"
            )
            show.log(f"{' and '.join(behind)} has not taken everything yet; {rest}")
        if rank.alone:
            run.note("end", attempt=number, code=0)
    trainer.engine.close()
    distributed.leave()


def _shown_settings(run: RunDirectory) -> Path:
    """Settings for upload: ``config.yaml``, or a copy without the query strings of signed URLs."""
    text = (run.path / "config.yaml").read_text()
    if (clean := hide_secrets(text)) == text:
        return (run.path / "config.yaml").resolve()
    copy = run.tracking / "config.yaml"
    copy.write_text(clean)
    return copy.resolve()


def _scores(scores: dict[str, float]) -> str:
    last = {name: value for name, value in scores.items() if name.startswith("knn/")}
    return "".join(f", {name} {value:.3f}" for name, value in last.items())


def main(body: Callable[[RankContext], None] | None = None) -> int:
    """Entry of ``python -m launch.rank_main``; for ``body`` see :func:`train`."""
    from launch.streams import open_streams
    from launch.terminal import clean_logs

    open_streams()
    clean_logs()
    config_path, attempt, checkpoint = sys.argv[1:4]
    config = Config.model_validate(json.loads(Path(config_path).read_text()))
    start = saved.read(Path(checkpoint)) if checkpoint != "-" else None
    try:
        return train(config, RankEnvironment.read(), int(attempt), start, body=body)
    except FoveaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "stopped before its first step: there was nothing to save, the same command starts again", file=sys.stderr, flush=True
        )
        return 130
    except BaseException as error:
        known = of_system(error) if isinstance(error, OSError) else None
        print(f"error: {known}" if known else shown(traceback.format_exc()), file=sys.stderr, flush=True)
        return 1


def leave(code: int) -> NoReturn:
    """End this rank's process with the code of :func:`main`."""
    if code:
        _leave(code)
    end_process(code)


if __name__ == "__main__":
    leave(main())
