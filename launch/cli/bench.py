"""``fovea bench``: benchmarks of speed, memory and methods against baselines.

What each of them measures, and the kept results: pipeline/bench/README.md.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.cli.choices import Device, StepMethod, VitSize, output_stem
from pipeline.errors import ConfigError

app = typer.Typer(help="Measure speed and memory against baselines in the same run.", no_args_is_help=True)


_STEP_MODELS = {StepMethod.CLIP: "B-32", StepMethod.DINOV2: "S-14"}
_FLOPS = ("dinov2/vits16_node", "dinov2/vitb16_node", "dinov2/vitl16_short", "clip/vit_b32_cc12m", "clip/vit_b16_cc12m")

DeviceOption = Annotated[Device, typer.Option(help="Device to measure on.")]
ModelOption = Annotated[VitSize, typer.Option(help="Size of the ViT.")]
Out = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Output path of the results, without extension.", callback=output_stem)
]
Prototypes = Annotated[int, typer.Option(min=16, help="Prototypes per head.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measured rounds.")]
Side = Annotated[int, typer.Option(min=32, help="Side of the global crops, pixels; a multiple of 16.")]
Width = Annotated[int, typer.Option(min=16, help="Width of the student's layers.")]
Depth = Annotated[int, typer.Option(min=1, help="Number of layers.")]


# ---- speed and memory ---------------------------------------------------------------------------------------------------


@app.command()
def data(
    shards: Annotated[
        list[str] | None, typer.Option(help="Shards to measure on; by default images are packed for the benchmark.")
    ] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs to pack; by default synthetic scenes.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images per round.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds, of which the best counts.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Images per micro-batch.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the decoder and of DALI.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes of torchvision's DataLoader.")] = 0,
    world: Annotated[int, typer.Option(min=1, help="World size to simulate; the first rank is measured.")] = 1,
    device: Annotated[Device, typer.Option(help="cuda measures images per second on the GPU.")] = Device.CPU,
    before: Annotated[Path | None, typer.Option(help="Checkout of an earlier version to compare with, and nothing else.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="One round of at most 64 images, as a smoke test.")] = False,
    out: Out = None,
) -> None:
    """Benchmark reading, decoding and augmenting against torchvision's DataLoader and DALI's own reader.

    [b]Examples[/b]

    fovea bench data --photos ~/photos

    fovea bench data --shards '/data/train-{000..003}.tar' --threads 4 --out results/mine
    """
    from pipeline.bench.data import Options, markdown, measure

    if smoke:
        images, rounds = min(images, 64), 1
    options = Options(tuple(shards or ()), photos, images, rounds, batch, threads, workers, world)
    if before is not None:
        from pipeline.bench import data_versions

        compared = data_versions.measure(options, before.absolute(), log=log)
        save("data-versions-cpu", out, partial(data_versions.markdown, compared), asdict(compared))
        return
    if _available(device) == Device.CUDA:
        from pipeline.bench.gpu import measure as measure_gpu

        result = measure_gpu(options, log=log)
    else:
        result = measure(options, log=log)
    save(f"data-{device}", out, partial(markdown, result), asdict(result))


@app.command()
def checkpoint(
    model: ModelOption = VitSize.SMALL,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 16,
    side: Side = 224,
    prototypes: Prototypes = 65536,
    saves: Annotated[int, typer.Option(min=1, help="Checkpoints of each kind, of which the median counts.")] = 3,
    device: DeviceOption = Device.CPU,
    directory: Annotated[Path | None, typer.Option(help="Folder on the disk to measure.")] = None,
    out: Out = None,
) -> None:
    """Benchmark checkpoints: how long training pauses for a synchronous and an asynchronous save, and how long loading takes.

    [b]Examples[/b]

    fovea bench checkpoint

    fovea bench checkpoint --model large --device cuda --batch 32 --directory /scratch
    """
    from pipeline.bench.checkpoint import Options, markdown, measure

    options = Options(model, batch, side, prototypes, saves, _available(device), directory)
    result = measure(options, log=log)
    save(f"checkpoint-{device}", out, partial(markdown, result, options), {"options": asdict(options), **asdict(result)})


@app.command()
def scale(
    before: Annotated[
        Path | None, typer.Option(help="Checkout of an earlier version to measure in the same run.", exists=True, file_okay=False)
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Few shards, as a smoke test.")] = False,
    out: Out = None,
) -> None:
    """Benchmark how costs grow: start of a rank, manifest, evaluation samples, reading, downloads. Needs about 2 GB of disk.

    [b]Examples[/b]

    fovea bench scale --smoke

    fovea bench scale --before ../fovea-0.9
    """
    from pipeline.bench.scale import Options, markdown, measure
    from pipeline.bench.streams import compared, defaults, mixing

    options = replace(Options.smoke() if smoke else Options(), before=before and before.resolve())
    curves = measure(options, log=log)
    log("streams and estimates")
    rows = mixing(options.shape, options.streams)
    chosen = defaults(options.shape, (8,) if smoke else (1, 8, 64, 512))
    estimates = compared(options.shape, options.streams[::3], 1 if smoke else 8, options.scenes)
    save(
        "scale",
        out,
        lambda machine, command: markdown(curves, options, machine, command, rows=rows, estimates=estimates, chosen=chosen),
        {
            "curves": [asdict(c) for c in curves],
            "streams": [asdict(row) for row in rows],
            "defaults": [asdict(row) for row in chosen],
            "estimates": [asdict(one) for one in estimates],
        },
    )


@app.command()
def flops(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG]...", help="Configs; by default the standard model sizes.")
    ] = None,
    out: Out = None,
) -> None:
    """Count the FLOPs per sample of a step with torch's counter and by formula; needs no GPU and no data.

    [b]Example[/b]

    fovea bench flops dinov2/vitl14_long clip/vit_b32_cc12m
    """
    from pipeline.bench.flops import cost, markdown
    from pipeline.config.load import load

    costs = []
    for name in names or _FLOPS:
        log(f"counting {name}")
        costs.append(cost(name, load(name, ["data.shards=none.tar"]).config))
    save("flops", out, partial(markdown, costs), {"costs": [asdict(one) for one in costs]})


@app.command()
def prototype_loss(
    prototypes: Annotated[int, typer.Option(min=2, help="Prototypes of the head.")] = 65536,
    samples: Annotated[int, typer.Option(min=1, help="Samples, of ten crops each.")] = 16,
    masked: Annotated[int, typer.Option(min=1, help="Masked patches in total.")] = 600,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of logits per chunk; by default the training default.")] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--fp32", help="Precision of matrix products; by default bf16 on cuda.")
    ] = None,
    rounds: Rounds = 3,
    device: DeviceOption = Device.CPU,
    out: Out = None,
) -> None:
    """Benchmark prototype heads, Sinkhorn and losses in chunks against the plain formulas with full logits: time and memory.

    On a GPU with Triton, its kernels are compared with the same chunks in plain torch.

    [b]Example[/b]

    fovea bench prototype-loss --prototypes 131072 --masked 5000 --device cuda
    """
    from pipeline.bench.prototype_loss import Options, markdown, measure

    low = device == Device.CUDA if bf16 is None else bf16
    sizes: dict[str, Any] = {"samples": samples, "masked": masked, "rows": rows, "rounds": rounds}
    options = Options(prototypes, **sizes, device=_available(device), bf16=low)
    result = measure(options, log=log)
    save("prototype-loss", out, partial(markdown, result, options), asdict(result))


@app.command()
def step(
    method: Annotated[
        StepMethod, typer.Option(help="clip, against open_clip; dinov2, against the official code if installed.")
    ] = StepMethod.CLIP,
    model: Annotated[
        str | None, typer.Option(help="clip: B-32, B-16, L-16, tiny; dinov2: S-14, B-14, L-14, -16, tiny-14.")
    ] = None,
    batch: Annotated[int, typer.Option(min=2, help="Samples per step.")] = 8,
    caption: Annotated[int, typer.Option(min=3, max=77, help="Tokens per caption, including start and end tokens.")] = 20,
    prototypes: Annotated[int, typer.Option(min=2, help="Prototypes of DINOv2's head.")] = 65536,
    drop: Annotated[float, typer.Option(min=0.0, max=0.9, help="Drop rate of DINOv2's stochastic depth.")] = 0.3,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also measure our step with compiled blocks.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="As --compiled, replayed as CUDA graphs.")] = False,
    rounds: Rounds = 3,
    device: DeviceOption = Device.CPU,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute under bf16 autocast.")] = False,
    out: Out = None,
) -> None:
    """Benchmark a training step against other implementations with the same weights and batch; the losses are compared first.

    The official DINOv2: pip install --no-deps dinov2 xformers && pip install omegaconf fvcore

    [b]Examples[/b]

    fovea bench step --model B-16 --batch 512 --device cuda --bf16

    fovea bench step --method dinov2 --model L-14 --batch 64 --device cuda --bf16 --compiled
    """
    from pipeline.bench.step import Options, markdown, measure

    if graphs and device != Device.CUDA:
        raise ConfigError("CUDA graphs need a CUDA device", where="--graphs", hint="Remove the option, or add --device cuda")
    sizes: dict[str, Any] = {"batch": batch, "caption": caption, "prototypes": prototypes, "drop": drop, "rounds": rounds}
    modes: dict[str, Any] = {"compiled": compiled, "graphs": graphs, "device": _available(device), "bf16": bf16}
    options = Options(method, model or _STEP_MODELS[method], **sizes, **modes)
    result = measure(options, log=log)
    save(f"step-{method}", out, partial(markdown, result, options), asdict(result))


@app.command()
def collectives(
    width: Width = 256,
    depth: Depth = 4,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks on this host.")] = 2,
    accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 1,
    out: Out = None,
) -> None:
    """Count the collectives and bytes per step of each ZeRO stage on gloo ranks, and compare them with theory.

    [b]Example[/b]

    fovea bench collectives --ranks 2 --accumulation 2
    """
    from pipeline.bench.collectives import Options, markdown, measure

    options = Options(width, depth, ranks, accumulation)
    stages = measure(options, log=log)
    document = {"options": asdict(options), "stages": [asdict(one) for one in stages]}
    save("collectives", out, partial(markdown, stages, options), document)


@app.command()
def trainer_overhead(
    steps: Annotated[int, typer.Option(min=2, help="Measured steps.")] = 200,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between two lines of the journal.")] = 10,
    out: Out = None,
) -> None:
    """Measure the overhead of the training loop: the trainer, the engine alone and plain torch in turns, on a minimal model.

    [b]Example[/b]

    fovea bench trainer-overhead
    """
    from pipeline.bench.trainer_overhead import Options, markdown, measure

    options = Options(steps, log_every)
    result = measure(options, log=log)
    save("trainer-overhead", out, partial(markdown, result, options), asdict(result))


@app.command()
def signatures(
    steps: Annotated[int, typer.Option(min=2, help="Measured steps.")] = 40,
    batch: Annotated[int, typer.Option(min=2, help="Samples per step.")] = 64,
    every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 20,
    out: Out = None,
) -> None:
    """Measure what the signatures of steps cost in a real small training: time beside that of the step, and bytes.

    [b]Example[/b]

    fovea bench signatures
    """
    from pipeline.bench.signatures import Options, markdown, measure

    options = Options(steps, batch, every)
    result = measure(options, log=log)
    save("signatures", out, partial(markdown, result, options), asdict(result))


@app.command()
def verification(
    steps: Annotated[int, typer.Option(min=4, help="Measured steps, of which every second one is verified.")] = 40,
    batch: Annotated[int, typer.Option(min=2, help="Samples per step.")] = 64,
    out: Out = None,
) -> None:
    """Measure what a step costs that is done twice to find silent corruption (train.verify_every), in a real small training.

    [b]Example[/b]

    fovea bench verification
    """
    from pipeline.bench.verification import Options, markdown, measure

    options = Options(steps, batch)
    result = measure(options, log=log)
    save("verification", out, partial(markdown, result, options), asdict(result))


@app.command()
def recompilations(
    methods: Annotated[list[str] | None, typer.Argument(metavar="[METHOD]...", help="Methods; by default all.")] = None,
    steps: Annotated[int, typer.Option(min=4, help="Steps of each method.")] = 50,
    before: Annotated[Path | None, typer.Option(metavar="DIR", help="Root of an earlier checkout, to compare with.")] = None,
    out: Out = None,
) -> None:
    """Count the graphs that torch.compile compiles in each step of a method, and the blocks that run compiled.

    [b]Example[/b]

    fovea bench recompilations dinov2 detailclip
    """
    from pipeline.bench.prove.methods import CONFIGS
    from pipeline.bench.recompilations import document, markdown, measure

    names = methods or list(CONFIGS)
    if unknown := next((name for name in names if name not in CONFIGS), None):
        raise ConfigError(f"{unknown} is not a method", where="METHOD", hint=f"Choose one of {', '.join(CONFIGS)}")
    rows = []
    for row in measure(names, steps, before):
        rows.append(row)
        log(f"{row[0]}: {row[2].first} graphs in the first steps, then {row[2].later}")
    save("recompilations", out, partial(markdown, rows), document(rows))


@app.command()
def resume(width: Width = 512, depth: Depth = 16, rounds: Rounds = 5, out: Out = None) -> None:
    """Compare a resume from a checkpoint with a fresh start, each up to the end of its first step.

    [b]Example[/b]

    fovea bench resume --width 1024
    """
    from pipeline.bench.plain import Size
    from pipeline.bench.resume import Options, markdown, measure

    options = Options(Size(width, depth, 256), rounds)
    result = measure(options, log=log)
    save("resume", out, partial(markdown, result, options), asdict(result))


@app.command()
def determinism(
    model: ModelOption = VitSize.TINY,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 8,
    side: Side = 96,
    prototypes: Prototypes = 4096,
    rounds: Rounds = 5,
    device: DeviceOption = Device.CPU,
    out: Out = None,
) -> None:
    """Measure the cost of train.deterministic: DINOv2's step with and without it, in turns.

    [b]Example[/b]

    fovea bench determinism --device cuda --model large --batch 32 --side 224
    """
    from pipeline.bench.checkpoint import Options
    from pipeline.bench.determinism import markdown, measure

    if _available(device) == Device.CUDA:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, and is deterministic only with it
    options = Options(model, batch, side, prototypes, device=_available(device))
    cases = measure(options, rounds=rounds, log=log)
    document = {"cases": {name: asdict(case) for name, case in cases.items()}}
    save("determinism", out, partial(markdown, cases, options), document)


# ---- all, and the table of results --------------------------------------------------------------------------------------

Benchmark = tuple[str, Callable[..., None], dict[str, Any], dict[str, Any]]  # name, command, its arguments, those of --smoke


def benchmarks() -> list[Benchmark]:
    """The benchmarks of ``all``: all but those of bench_methods.py and bench_learning.py."""
    tiny = {"model": VitSize.TINY, "batch": 2, "side": 32, "prototypes": 64}
    large = {"model": VitSize.SMALL, "batch": 16, "side": 224, "prototypes": 65536}
    return [
        ("flops", flops, {}, {"names": ["dinov2/vits16_node"]}),
        ("prototype-loss", prototype_loss, {}, {"prototypes": 256, "samples": 2, "masked": 100, "rounds": 1}),
        ("step", step, {}, {"model": "tiny", "batch": 2, "rounds": 1}),
        (
            "step-dinov2",
            partial(step, method=StepMethod.DINOV2, batch=4),
            {},
            {"model": "tiny-14", "prototypes": 256, "rounds": 1},
        ),
        ("collectives", collectives, {}, {"width": 32, "depth": 2}),
        ("recompilations", recompilations, {}, {"methods": ["clip"], "steps": 4}),
        ("trainer-overhead", trainer_overhead, {}, {"steps": 10, "log_every": 5}),
        ("signatures", signatures, {}, {"steps": 3, "batch": 8, "every": 3}),
        ("verification", verification, {}, {"steps": 4, "batch": 8}),
        ("determinism", determinism, {**large, "rounds": 3}, {**tiny, "rounds": 1}),
        ("resume", resume, {}, {"width": 64, "depth": 2, "rounds": 1}),
        ("checkpoint", checkpoint, large, {**tiny, "saves": 1}),
        ("data", data, {}, {"images": 16, "batch": 8, "smoke": True}),
        ("scale", scale, {}, {"smoke": True}),
    ]


@app.command(name="all")
def all_(
    smoke: Annotated[bool, typer.Option("--smoke", help="Minimal size, as a smoke test.")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory of the results.")] = Path("bench-results"),
) -> None:
    """Run every benchmark of speed and memory in turn, on the CPU.

    [b]Example[/b]

    fovea bench all --smoke
    """
    from pipeline.bench.plain import alone

    with alone():  # one group for all: DeepSpeed does not support a second one in the same process
        for name, command, arguments, smoke_arguments in benchmarks():
            log(f"bench {name}")
            command(**(smoke_arguments if smoke else arguments), out=out / name)


@app.command()
def readme(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="By default README.md and pipeline/bench/README.md.")
    ] = None,
) -> None:
    """Update the tables of benchmarks in the READMEs from the results in pipeline/bench/results."""
    from pipeline.bench.summary import update

    for file in files or (Path("README.md"), Path("pipeline/bench/README.md")):
        try:
            file.write_text(update(file.read_text()))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the table cannot be written ({error})", where=str(file), hint="Choose a README of fovea"
            ) from error


# ---- shared -------------------------------------------------------------------------------------------------------------


def _available(device: Device) -> Device:
    if device == Device.CUDA:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("no CUDA device is available", where="--device", hint="Choose cpu")
    return device


def log(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr)


def stem_of(name: str, out: Path | None) -> Path:
    """Output path of a result, without extension."""
    return out or Path("bench-results") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M}"


def save(name: str, out: Path | None, render: Callable[[dict[str, str], str], str], document: dict[str, Any]) -> None:
    """Print the page, and save it with all figures."""
    from pipeline.bench.report import write

    stem = stem_of(name, out)
    print(write(stem, command_line(), render, document))
    log(f"wrote {stem}.md")


def command_line() -> str:
    """This command line, for the result page."""
    return shlex.join(["fovea", *sys.argv[1:]])
