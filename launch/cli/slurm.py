"""Slurm subcommands: submit, status, logs, stop, resume, requeue, cancel, runs, doctor."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.cli.choices import RunOrder, local_only
from launch.terminal import Terminal
from pipeline.errors import ConfigError, LaunchError
from pipeline.untrusted import open_regular, printable, shown

if TYPE_CHECKING:
    from launch.slurm.submit import Submitted
    from pipeline.runtime.run_directory import RunDirectory

_LOG = 2 << 20  # bytes of a log that are read at once

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name below runs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override; cluster.KEY=VALUE overrides the profile."),
]


def submit(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a config that comes with fovea.")],
    overrides: Overrides = None,
    cluster: Annotated[str, typer.Option("--cluster", "-c", help="Cluster profile: a YAML file or a name.")] = "",
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script and the command; write and submit nothing.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Ask Slurm whether and when the job could run.")] = False,
    index: Annotated[bool, typer.Option("--index/--no-index", help="Index the shards now, or when the job starts.")] = True,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log.")] = False,
) -> None:
    """Submit a run to Slurm. It saves before time limits and preemption and is requeued until it is finished.

    [b]Examples[/b]

    fovea submit dinov2/cifar10_vit_tiny --cluster my.yaml data.shards='s3://bucket/train-{000..099}.tar'

    fovea submit my_run.yaml -c my.yaml cluster.nodes=4 cluster.time=12:00:00 --dry-run --check
    """
    from launch.slurm import profile as profiles
    from launch.slurm.submit import submit as hand_over
    from pipeline.config.load import load

    if not cluster:
        known = ", ".join(sorted(profiles.available()))
        raise ConfigError("is required", where="--cluster", hint=f"Give a profile's file, or one of {known}")
    own = [text.removeprefix("cluster.") for text in overrides or () if text.startswith("cluster.")]
    rest = [text for text in overrides or () if not text.startswith("cluster.")]
    done = hand_over(load(config, rest), profiles.load(cluster, own), dry=dry, check=check, index=index)
    _print_submitted(done)
    if follow and done.job is not None:
        logs(str(done.run), follow=True)


def _print_submitted(done: Submitted) -> None:
    if done.test_output:
        print(shown(done.test_output), file=sys.stderr)
    if done.job is None:
        print(done.script, end="")
        print(f"# {shlex.join(done.command)}")
        return
    print(f"job {done.job}\nrun {done.run}\nlog {done.run / 'logs'}")


def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run; by default all runs below runs/.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[
        float, typer.Option("--watch", min=0, help="A live view, refreshed after so many seconds, until the run ends.")
    ] = 0.0,
) -> None:
    """Show the status of a run: queue, step, speed, expected end, GPU use, cost, last heartbeat, attempts, and use of the time.

    The expected end counts the attempts that the time limit makes necessary, each with the mean time in the queue and of a start
    that this run has had so far.

    [b]Examples[/b]

    fovea status my_run

    fovea status my_run --watch 5
    """
    from launch.slurm import status as standing

    if watch and not as_json:
        from launch.cli.status_view import watch_run, watch_runs

        if run is None:
            watch_runs(lambda: run_lines(Path("runs"), "", RunOrder.NAME, ""), watch)
        else:
            watch_run(standing.find(run), watch)
        return
    while True:
        if run is None:
            runs()
        else:
            one = standing.status(standing.find(run))
            print(standing.as_json(one) if as_json else shown(standing.table(one)))
        if not watch:
            return
        time.sleep(watch)


def runs(
    folder: Annotated[Path, typer.Argument(help="Directory of the runs.")] = Path("runs"),
    state: Annotated[str, typer.Option(help="Only runs in these states, such as running,waiting.")] = "",
    sort: Annotated[RunOrder, typer.Option(help="Order of the list; scores and times from the largest.")] = RunOrder.NAME,
    score: Annotated[str, typer.Option(metavar="NAME", help="Score to show, such as knn/top1; by default the first.")] = "",
) -> None:
    """List the runs of a directory with their time, cost and score, one line each.

    [b]Example[/b]

    fovea runs --state failed,stopped --sort hours
    """
    print("\n".join(map(printable, run_lines(folder, state, sort, score))))


def run_lines(folder: Path, state: str, sort: RunOrder, score: str) -> list[str]:
    """The lines of ``fovea runs``, a header first; arguments as there.

    Raises:
        ConfigError: there are no runs.
    """
    from launch.slurm import status as standing
    from pipeline.runtime.clock import clock
    from pipeline.runtime.run_directory import RunDirectory

    run_folders = [RunDirectory(path.parent.absolute()) for path in sorted(folder.glob("*/config.json"))]
    if not run_folders:
        raise ConfigError(f"there are no runs in {folder}", hint="Name the directory that contains them")
    listed = standing.queue_of(run_folders)
    rows = []
    for run in run_folders:
        one = standing.status(run, listed)
        value = one.scores.get(score) if score else next(iter(one.scores.values()), None)
        if not state or one.state in state.split(","):
            rows.append((run.path.name, one, value))
    keys: dict[RunOrder, Callable[[tuple[str, standing.Status, float | None]], Any]] = {
        RunOrder.STATE: lambda row: row[1].state,
        RunOrder.TIME: lambda row: -row[1].goodput.wall,
        RunOrder.HOURS: lambda row: -row[1].cost.hours,
        RunOrder.SCORE: lambda row: -row[2] if row[2] is not None else float("inf"),
    }
    if sort in keys:
        rows.sort(key=keys[sort])
    width = max((len(name) for name, *_ in rows), default=4)
    lines = [f"{'run':<{width}}  {'state':<8}  {'step':>15}  {'time':>9}  {'hours':>8}  {'price':>9}  {'score':>7}"]
    for name, one, value in rows:
        done = f"{one.step}/{one.steps}" if one.steps else str(one.step)
        price = f"{one.cost.price:.2f}" if one.cost.price is not None else "-"
        number = f"{value:.4f}" if value is not None else "-"
        columns = f"{one.state:<8}  {done:>15}  {clock(one.goodput.wall):>9}  {one.cost.hours:>8.2f}  {price:>9}  {number:>7}"
        lines.append(f"{name:<{width}}  {columns}  {one.why}")
    return lines


def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log, across attempts.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Rank whose log is shown.")] = 0,
    attempt: Annotated[int | None, typer.Option(min=0, help="Attempt whose log is shown; the newest by default.")] = None,
    batch: Annotated[bool, typer.Option("--batch", help="Show the batch script's own log: starts, decisions, requeues.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Number of last lines to show first.")] = 40,
) -> None:
    """Show a log of a run; by default rank 0 of the newest attempt."""
    from launch.slurm import status as standing
    from pipeline.runtime import job_record as record

    run_directory = standing.find(run)

    def current() -> Path | None:
        if batch:
            return max((run_directory.path / "logs").glob("batch-*.log"), default=None, key=lambda path: path.stat().st_mtime)
        number = attempt if attempt is not None else run_directory.next_attempt() - 1
        path = run_directory.logs(number) / f"rank-{rank}.log"
        return path if path.exists() else None

    path = current()
    if path is None and not follow:
        log_files = sorted(
            str(file.relative_to(run_directory.path)) for file in (run_directory.path / "logs").glob("*/rank-*.log")
        )
        raise LaunchError(
            "the log file does not exist",
            where=str(run_directory.path),
            hint=f"Choose one of {', '.join(log_files[-5:]) or 'the logs that exist: none yet'}",
        )
    last, offset = None, 0
    while True:
        if path is not None and path != last:
            last = path
            print(f"==> {printable(str(path))}", file=sys.stderr)
            text, offset = _read_log(path)
            print(shown("\n".join(text.splitlines()[-lines:])))
        elif path is not None and path.stat().st_size > offset:
            text, offset = _read_log(path, offset)
            sys.stdout.write(shown(text))
            sys.stdout.flush()
        if not follow or (record.final_state(run_directory) and path == last):
            return
        time.sleep(1.0)
        path = current() or path


def _read_log(path: Path, offset: int | None = None) -> tuple[str, int]:
    """Reads at most 2 MiB of a log, from a byte offset or else its end; returns the text and the offset behind it."""
    with os.fdopen(open_regular(path, error=LaunchError), "rb") as file:
        begin = max(os.fstat(file.fileno()).st_size - _LOG, 0) if offset is None else offset
        file.seek(begin)
        content = file.read(_LOG)
    return content.decode("utf-8", "replace"), begin + len(content)


def stop(
    run: RunArgument,
    now: Annotated[
        bool, typer.Option("--now", help="Stop at once, without waiting for the end of the step and a checkpoint.")
    ] = False,
) -> None:
    """Save a checkpoint and stop a run; it stays stopped until it is resumed."""
    from launch.slurm import status as standing
    from pipeline.runtime import job_record as record

    run_directory = standing.find(run)
    name = run_directory.path.name
    if now:
        cancel(run)
        return
    if over := standing.ended(run_directory):
        print(f"{name} is {over['state']} already ({shown(str(over['why']))}); nothing was changed")
        return
    record.request(run_directory, record.STOP, f"requested by {os.environ.get('USER', 'an unknown user')}")
    again = f"resume it with: fovea resume {run}"
    if record.job(run_directory) and not _alive(run_directory, ("RUNNING", "COMPLETING"), otherwise=True):
        jobs = _cancel_jobs(run_directory, "stopped by request while no attempt was running")
        print(f"{name} is stopped; {jobs} in the queue {'were' if ',' in jobs else 'was'} cancelled. {again}")
        return
    print(f"{name} saves and stops after the step it is in; {again}")


def _alive(run: RunDirectory, states: tuple[str, ...], *, otherwise: bool) -> bool:
    """Whether a job of the run has one of these states; a fixed answer where Slurm does not answer."""
    from launch.slurm.submit import living

    try:
        return any(job.state in states for job in living(run))
    except LaunchError as error:
        print(f"fovea: {shown(str(error))}", file=sys.stderr)
        return otherwise


def _cancel_jobs(run: RunDirectory, why: str) -> str:
    """Cancel all jobs of a run, successors first, and record that it is stopped; returns their numbers.

    Raises:
        LaunchError: Slurm does not answer; nothing is recorded then.
    """
    from launch.slurm import slurm_commands as tools
    from launch.slurm import status as standing
    from launch.slurm.submit import living
    from pipeline.runtime import job_record as record

    alive = living(run)
    if not standing.ended(run):
        record.end(run, "stopped", why)
    for job in reversed(alive):
        tools.cancel(job.id)
    return ", ".join(f"job {job.id}" for job in alive) or "no job"


def resume(
    run: RunArgument,
    overrides: Overrides = None,
    cluster: Annotated[str, typer.Option("--cluster", "-c", help="A cluster profile other than before.")] = "",
    forgive_nodes: Annotated[
        bool, typer.Option("--forgive-nodes", help="Use the excluded nodes again; `fovea status` shows them.")
    ] = False,
) -> None:
    """Resubmit a run that was stopped or gave up: it resumes from its newest checkpoint, with the current code.

    [b]Example[/b]

    fovea resume runs/trial cluster.nodes=4
    """
    from launch.slurm import profile as profiles
    from launch.slurm import status as standing
    from launch.slurm.submit import submit as hand_over
    from pipeline.config.load import load
    from pipeline.runtime import job_record as record

    run_directory = standing.find(run)
    facts = record.job(run_directory)
    if facts.get("kind") == "embed":
        raise LaunchError("is a job of `fovea embed`", where=run, hint="Repeat the command that submitted it; it continues")
    own = [text.removeprefix("cluster.") for text in overrides or () if text.startswith("cluster.")]
    rest = [text for text in overrides or () if not text.startswith("cluster.")]
    if not cluster and not facts:
        raise ConfigError("the run was never submitted to a cluster", where=run, hint="Give --cluster, or use `fovea train`")
    profile = profiles.load(cluster, own) if cluster else profiles.again(facts.get("profile"), own)
    if forgive_nodes:
        print(f"forgiven: {', '.join(record.forgive_nodes(run_directory)) or 'no node was excluded'}")
    _print_submitted(hand_over(load(str(run_directory.path / "config.yaml"), rest), profile, named=bool(cluster)))


def requeue(
    run: RunArgument,
    now: Annotated[
        bool, typer.Option("--now", help="Requeue at once, without waiting for the end of the step and a checkpoint.")
    ] = False,
) -> None:
    """Save, release the nodes and go back into the queue."""
    from launch.slurm import slurm_commands as tools
    from launch.slurm import status as standing
    from launch.slurm.submit import living
    from pipeline.runtime import job_record as record

    run_directory = standing.find(run)
    alive = [job for job in living(run_directory) if job.state == "RUNNING"]
    if not alive:
        raise LaunchError(
            "the run has no running job", where=str(run_directory.path), hint="Use `fovea resume` to submit it again"
        )
    attempt = run_directory.next_attempt() - 1
    if now and record.job(run_directory).get("after") == "requeue":
        tools.requeue(alive[0].id, sorted(record.excluded(run_directory)))
        print(f"job {alive[0].id} is back in the queue, where Slurm keeps it for two minutes")
        return
    if now:
        record.request(run_directory, f"{record.NOW}-{attempt}", "requeued")
        print(f"job {alive[0].id} ends its ranks in some seconds, without saving; the job that waits for it takes over at once")
        return
    record.request(run_directory, f"{record.STOP}-{attempt}", "requeued")
    print(f"job {alive[0].id} saves after the step it is in, and the run goes back into the queue")


def cancel(run: RunArgument) -> None:
    """Cancel a run's jobs at once, running or pending; no checkpoint is saved. An ended run stays as it is."""
    from launch.slurm import status as standing
    from pipeline.runtime import job_record as record

    run_directory = standing.find(run)
    over = standing.ended(run_directory)
    if not record.job(run_directory):
        raise LaunchError(
            "the run was never submitted to a cluster", where=run, hint="End its `fovea train` with Ctrl-C, or use `fovea stop`"
        )
    jobs = _cancel_jobs(run_directory, f"cancelled by {os.environ.get('USER', 'an unknown user')}")
    if over:
        print(f"{run_directory.path.name} is {over['state']} already ({shown(str(over['why']))}); cancelled: {jobs}")
    else:
        print(f"cancelled: {jobs}")


def doctor(
    cluster: Annotated[
        str, typer.Option("--cluster", "-c", help="Cluster profile, every field of which is compared with what Slurm says.")
    ] = "",
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a cluster profile from what Slurm says, to a new file.", callback=local_only),
    ] = None,
    partition: Annotated[str, typer.Option(metavar="NAME", help="Partition of --write; Slurm's default by default.")] = "",
) -> None:
    """Check what this host and its Slurm support, compare a cluster profile with it, or write one.

    [b]Examples[/b]

    fovea doctor

    fovea doctor --write site.yaml

    fovea doctor -c site.yaml
    """
    from launch.slurm.doctor import examine

    if write is not None:
        from launch.slurm import site, write_profile

        print(write_profile.write(site.ask(), write, partition or None))
        return

    console = Terminal(highlight=False, soft_wrap=True)
    problems = 0
    for state, what, advice in examine(cluster or None):
        mark = {"ok": "[green]ok[/]  ", "note": "[yellow]note[/]", "bad": "[red]bad[/] "}[state]
        console.print(f"{mark} {what}" + (f"\n       {advice}" if advice else ""))
        problems += state == "bad"
    raise typer.Exit(1 if problems else 0)


def enter(app: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    for verb in (submit, status, logs, stop, resume, requeue, cancel, runs, doctor):
        first = (verb.__doc__ or "").split(":")[0].split(";")[0].split(".")[0].split(",")[0]
        app.command(verb.__name__, rich_help_panel="Slurm", short_help=f"{first}.")(verb)
