"""``fovea replay``: the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.choices import local_only


def enter(app: typer.Typer) -> None:
    """Add the command to ``fovea``."""
    app.command(short_help="Execute steps of a run again and compare them, bit for bit.")(replay)


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")],
    step: Annotated[int | None, typer.Option(min=0, help="Step to replay, from 0.")] = None,
    until: Annotated[int | None, typer.Option(min=0, help="Last step, instead of only one.")] = None,
    spike: Annotated[bool, typer.Option("--spike", help="Replay around the largest rise of the loss.")] = False,
    sample: Annotated[str | None, typer.Option(metavar="KEY", help="Replay the first step with this sample.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--with", metavar="KEY=VALUE", help="Replay with another setting; repeatable.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Replay without a sample: another of its shard is used; repeatable.")
    ] = None,
    dump: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write batches, activations and gradients of the steps.", callback=local_only),
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Number of ranks, at most those of the run.")] = None,
    from_start: Annotated[bool, typer.Option("--from-start", help="Execute all steps from 0, without a checkpoint.")] = False,
) -> None:
    """Execute steps of a run again, from the newest checkpoint before them, and compare them with what the run recorded.

    Prints whether samples, inputs, loss terms, gradient norms and weights are equal, or what differs first: step, rank, and
    sample, term or tensor. With as many ranks on the same device they are compared bit for bit, else within bounds. Nothing is
    written into the run. The exit code is 1 if something differs.

    [b]Examples[/b]

    fovea replay runs/vitl16 --step 81234

    fovea replay runs/vitl16 --spike --dump spike

    fovea replay runs/vitl16 --step 81234 --until 81250 --with schedule.lr.peak=1e-4 --with train.precision=fp32

    fovea replay runs/vitl16 --step 81234 --without 000123456
    """
    from launch.cli.replay_run import ReplayOptions
    from launch.cli.replay_run import run as execute

    options = ReplayOptions(step, until, spike, sample, ranks, tuple(changes or ()), tuple(without or ()), dump, from_start)
    raise typer.Exit(execute(run, options))
