"""``fovea sweep``: a grid or a list of settings as one set of runs, on this machine or as Slurm jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.errors import ConfigError
from pipeline.untrusted import printable, shown


class _Group(TyperGroup):
    """``fovea sweep CONFIG …`` is ``fovea sweep run CONFIG …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="Train a config with a grid or a list of settings.\n\n"
    "[b]Example:[/b] fovea sweep my.yaml 'schedule.lr.peak=[[1e-3,2e-3]' 'run.seed=range(3)'".replace("[[", "\\["),
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A sweep's directory, or its name below runs/.")]


@app.command("run", short_help="Train all members of a sweep (the default: fovea sweep CONFIG …).")
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a config that comes with fovea.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUES]...",
            help="KEY=[A,B] and KEY=range(3) give a setting several values, KEY=VALUE one; a value that is a list itself needs "
            "two brackets. cluster.KEY=VALUE overrides the profile.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the sweep; by default the config's with _sweep.")] = "",
    list_: Annotated[
        Path | None, typer.Option("--list", metavar="FILE", help="Members: one set of KEY=VALUE per line, as in a shell.")
    ] = None,
    directory: Annotated[Path | None, typer.Option(help="Directory of the sweep; runs/NAME by default.")] = None,
    cluster: Annotated[str, typer.Option("--cluster", "-c", help="Cluster profile: the members become Slurm jobs.")] = "",
    max_jobs: Annotated[int | None, typer.Option(min=1, help="Members that run at the same time on the cluster.")] = None,
    halving: Annotated[
        str, typer.Option(metavar="SCORE", help="Stop members early by successive halving, compared by this score: knn/k20.")
    ] = "",
    eta: Annotated[int, typer.Option(min=2, max=100, help="With --halving: one of this many continues at each comparison.")] = 3,
    drop_failed: Annotated[
        bool,
        typer.Option("--drop-failed", help="With --halving: members that fail do not continue; by default the sweep stops then."),
    ] = False,
    index: Annotated[
        bool, typer.Option("--index/--no-index", help="On a cluster: index the shards now, or when the jobs start.")
    ] = True,
    wait: Annotated[bool, typer.Option("--wait", help="On a cluster: wait for the end; needed for --halving.")] = False,
) -> None:
    """Train a config once for each combination of settings. The same command continues after an interruption, also kill -9.

    The settings of all members are checked before the first starts. Members that are finished are not repeated; failed and
    stopped ones are resumed. On this machine the members run one after the other, on a cluster at most --max-jobs at a time. In
    MLflow the members are nested under one run.

    Successive halving (Jamieson and Talwalkar 2016): of n members, floor(n / ETA^(k+1)), but at least one, continue after
    comparison k. All are compared by the score that they have at ceil(steps / ETA^(K-k)) of their steps, K = floor(log_ETA(n)),
    where each is evaluated, saved and paused. decisions.json records steps, scores and who continues. A member whose loss stays
    non-finite does not continue.

    [b]Examples[/b]

    fovea sweep my.yaml 'schedule.lr.peak=\\[1e-3,2e-3]' 'run.seed=range(3)'

    fovea sweep my.yaml --list members.txt --cluster site.yaml --max-jobs 2

    fovea sweep my.yaml 'schedule.lr.peak=\\[1e-4,3e-4,1e-3,3e-3]' --halving knn/k20 --eta 2

    fovea sweep status my_sweep
    """
    from launch.cli.sweep_run import Order, train

    order = Order(
        config, tuple(settings or ()), name, list_, directory, cluster, max_jobs, halving, eta, drop_failed, index, wait
    )
    raise typer.Exit(train(order))


@app.command()
def status(name: NameArgument) -> None:
    """Show the state of each member."""
    from launch.cli.sweep_run import overview
    from launch.sweep.state import find

    print(shown(overview(find(name))))


@app.command()
def table(
    name: NameArgument,
    score: Annotated[str, typer.Option(metavar="SCORE", help="Score to sort by, such as knn/k20; by default the first.")] = "",
) -> None:
    """Show the members by score, with the settings in which they differ."""
    from launch.cli.sweep_run import ranking
    from launch.sweep.state import find

    print(printable_lines(ranking(find(name), score)))


def printable_lines(lines: list[str]) -> str:
    """Lines for the terminal."""
    return "\n".join(map(printable, lines))


@app.command()
def stop(name: NameArgument) -> None:
    """Save and stop the members that are running or waiting, and start no further ones."""
    from launch.cli import slurm as cluster
    from launch.slurm import status as standing
    from launch.sweep.state import STOP, find

    sweep = find(name)
    try:
        (sweep.path / STOP).touch()
    except OSError as error:
        raise ConfigError(f"cannot be written ({error.strerror})", where=str(sweep.path), hint="Check the permissions") from error
    for number in sweep.numbers:
        run_directory = sweep.run(number)
        if run_directory.config.exists() and standing.status(run_directory).state in ("running", "waiting", "unknown"):
            cluster.stop(str(run_directory.path))
    print(f"{printable(sweep.path.name)} starts no further members; the command that began it continues it")
