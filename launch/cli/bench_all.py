"""``fovea bench all``: runs every benchmark of speed and memory in turn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.cli import bench
from launch.cli.bench import app

_HEADS: dict[str, Any] = {"prototypes": 65536, "samples": 16, "masked": 600, "rows": None, "rounds": 3}
_STEP: dict[str, Any] = {
    **{"method": "clip", "model": "B-32", "batch": 8, "caption": 20, "prototypes": 65536, "drop": 0.3, "rounds": 3},
    **{"compiled": False, "graphs": False, "bf16": False},
}
_DINOV2: dict[str, Any] = {**_STEP, "method": "dinov2", "model": "S-14", "batch": 4}
_DATA: dict[str, Any] = {
    **{"shards": None, "photos": None, "images": 128, "rounds": 3, "batch": 32},
    **{"threads": 1, "workers": 0, "world": 1, "quick": False},
}
_COMMON: dict[str, Any] = {"device": "cpu"}

Acts = list[tuple[str, Any, dict[str, Any], dict[str, Any]]]  # name, command, its arguments, those at smoke-test size


def acts() -> Acts:
    """The benchmarks of ``all``: all except those that train for long."""
    small = {"prototypes": 256, "samples": 2, "masked": 100, "rows": None, "rounds": 1}
    return [
        ("flops", bench.flops, {"names": None}, {"names": ["dinov2/vits16_node"]}),
        ("heads", bench.heads, {**_HEADS, "bf16": None, **_COMMON}, {**small, "bf16": None, **_COMMON}),
        ("step", bench.step, {**_STEP, **_COMMON}, {**_STEP, "model": "tiny", "batch": 2, "rounds": 1, **_COMMON}),
        (
            "step-dinov2",
            bench.step,
            {**_DINOV2, **_COMMON},
            {**_DINOV2, "model": "tiny-14", "prototypes": 256, "rounds": 1, **_COMMON},
        ),
        (
            "comm",
            bench.comm,
            {"width": 256, "depth": 4, "ranks": 2, "accumulation": 1},
            {"width": 32, "depth": 2, "ranks": 2, "accumulation": 1},
        ),
        ("loop", bench.loop, {"steps": 200, "log_every": 10}, {"steps": 10, "log_every": 5}),
        (
            "determinism",
            bench.determinism,
            {"model": "small", "batch": 16, "side": 224, "prototypes": 65536, "rounds": 3, **_COMMON},
            {"model": "tiny", "batch": 2, "side": 32, "prototypes": 64, "rounds": 1, **_COMMON},
        ),
        ("resume", bench.resume, {"width": 512, "depth": 16, "rounds": 5}, {"width": 64, "depth": 2, "rounds": 1}),
        (
            "checkpoint",
            bench.checkpoint,
            {"model": "small", "batch": 16, "side": 224, "prototypes": 65536, "saves": 3, "directory": None, **_COMMON},
            {"model": "tiny", "batch": 2, "side": 32, "prototypes": 64, "saves": 1, "directory": None, **_COMMON},
        ),
        ("data", bench.data, {**_DATA, **_COMMON}, {**_DATA, "images": 16, "rounds": 1, "batch": 8, "quick": True, **_COMMON}),
    ]


@app.command(name="all")
def everything(
    tiny: Annotated[bool, typer.Option("--tiny", help="Minimal size, as a smoke test.")] = False,
    out: Annotated[Path | None, typer.Option(help="Output directory of the results.")] = None,
) -> None:
    """Run every benchmark in turn, on the CPU.

    [b]Example[/b]

    fovea bench all --tiny
    """
    from pipeline.bench.plain import alone

    folder = out or Path("bench-results")
    with alone():  # one group for all: DeepSpeed does not support a second one in the same process
        for name, act, large, small in acts():
            print(f"bench {name}", file=sys.stderr)
            act(**(small if tiny else large), out=folder / name)


@app.callback(invoke_without_command=True)
def choose(
    context: typer.Context,
    all_: Annotated[bool, typer.Option("--all", help="Run every benchmark in turn, like the command all.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="With --all: minimal size, as a smoke test.")] = False,
    out: Annotated[Path | None, typer.Option(help="With --all: output directory of the results.")] = None,
) -> None:
    """Measure speed and memory against baselines in the same run."""
    if context.invoked_subcommand is None:
        if not all_:
            print(context.get_help())
            raise typer.Exit(2)
        everything(tiny, out)
