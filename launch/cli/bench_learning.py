"""``fovea bench``: what networks learn, beside another library and with small batches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.bench import Out
from launch.cli.bench_methods import app, collect
from pipeline.errors import ConfigError

__all__ = ["app"]


@app.command()
def peers(
    methods: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="simclr, byol, mocov2, dino; by default all.")
    ] = None,
    shards: Annotated[
        str, typer.Option(help="Labelled training shards of small images, such as CIFAR-10; val-*.tar beside them.")
    ] = "cifar10/train-{00000..00009}.tar",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each side, with seeds from 0.")] = 3,
    epochs: Annotated[float | None, typer.Option(min=0.01, help="Length of a run; by default that of the config.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Comparisons of time, in turns.")] = 3,
    directory: Annotated[Path, typer.Option(help="Output directory; runs that ended in it are not repeated.")] = Path(
        "runs/bench-peers"
    ),
    out: Out = None,
) -> None:
    """Train the small configs and a plain loop of lightly's modules on the same images; compare k-NN and CPU time.

    Needs lightly: pip install --no-deps lightly lightly-utils

    [b]Examples[/b]

    fovea bench peers --shards 'cifar10/train-{00000..00009}.tar'

    fovea bench peers simclr --seeds 1 --epochs 2
    """
    from pipeline.bench.peers import METHODS, Options, line, markdown, measure

    for name in methods or ():
        if name not in METHODS:
            raise ConfigError(f"{name!r} has no peer", where="METHOD", hint=f"Choose one of {', '.join(METHODS)}")
    options = Options(shards, directory.absolute(), seeds, epochs, rounds=rounds)
    collect("peers-cpu", out, measure(methods or METHODS, options), line, markdown, "runs")


@app.command()
def small_batches(
    methods: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="dinov2, simclr, clip; by default all.")
    ] = None,
    shards: Annotated[
        str, typer.Option(help="Labelled training shards of small images with captions, such as CIFAR-10; val-*.tar beside them.")
    ] = "cifar10/train-{00000..00009}.tar",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each way, with seeds from 0.")] = 3,
    epochs: Annotated[float | None, typer.Option(min=0.01, help="Length of a run; by default that of the config.")] = None,
    large: Annotated[int, typer.Option(min=2, help="Global batch size.")] = 512,
    small: Annotated[int, typer.Option(min=1, help="Size of a micro-batch, and of the small batch; divides the other.")] = 32,
    directory: Annotated[Path, typer.Option(help="Output directory; runs that ended in it are not repeated.")] = Path(
        "runs/bench-small-batches"
    ),
    out: Out = None,
) -> None:
    """Train with a large batch at once, in micro-batches (exact, naive), and with the small batch alone; compare k-NN.

    [b]Examples[/b]

    fovea bench small-batches --shards 'cifar10/train-{00000..00009}.tar'

    fovea bench small-batches clip --seeds 1 --epochs 1
    """
    from pipeline.bench.small_batches import METHODS, Options, line, markdown, measure

    for name in methods or ():
        if name not in METHODS:
            raise ConfigError(f"{name!r} is not compared", where="METHOD", hint=f"Choose one of {', '.join(METHODS)}")
    if large % small or large == small:
        raise ConfigError(f"{small} does not divide {large}", where="--small", hint="Choose a divisor of --large")
    options = Options(shards, directory.absolute(), seeds, epochs, large, small)
    collect("small-batches-cpu", out, measure(list(methods or METHODS), options), line, markdown, "runs")
