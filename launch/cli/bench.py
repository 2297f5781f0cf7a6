"""``fovea bench``: benchmarks of speed, memory and methods against baselines."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory against baselines in the same run.")


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
    device: Annotated[str, typer.Option(help="cpu, or cuda to measure images per second on the GPU.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="One round of 64 images, as a smoke test.")] = False,
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Benchmark reading, decoding and augmenting against torchvision's DataLoader and DALI's own reader.

    [b]Examples[/b]

    fovea bench data --photos ~/pictures

    fovea bench data --shards '/data/train-{000..003}.tar' --threads 4 --out results/mine
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"{device!r} is neither cpu nor cuda", where="--device", hint="Choose one of the two.")
    from pipeline.bench.data import Options, measure
    from pipeline.bench.report import save

    if quick:
        images, rounds = min(images, 64), 1
    options = Options(tuple(shards or ()), photos, images, rounds, batch, threads, workers, world)

    def tell(sentence: str) -> None:
        print(sentence, file=sys.stderr)

    if device == "cuda":
        from pipeline.bench.gpu import measure as measure_gpu

        result = measure_gpu(options, tell=tell)
    else:
        result = measure(options, tell=tell)
    stem = out or Path("bench-results") / f"data-{device}-{datetime.now(UTC):%Y%m%d-%H%M}"
    document, page = save(result, stem, shlex.join(["fovea", *sys.argv[1:]]))
    print(page.read_text())
    print(f"wrote {document} and {page}", file=sys.stderr)


@app.command()
def checkpoint(
    model: Annotated[str, typer.Option(help="Size of the ViT: tiny, small, base or large.")] = "small",
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 16,
    side: Annotated[int, typer.Option(min=32, help="Side of the global crops, pixels; a multiple of 16.")] = 224,
    prototypes: Annotated[int, typer.Option(min=16, help="Prototypes per head.")] = 65536,
    saves: Annotated[int, typer.Option(min=1, help="Checkpoints of each kind, of which the median counts.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    directory: Annotated[Path | None, typer.Option(help="Folder on the disk to measure.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Benchmark checkpoints: how long training pauses for a synchronous and an asynchronous save, and how long loading takes.

    [b]Examples[/b]

    fovea bench checkpoint

    fovea bench checkpoint --model large --device cuda --batch 32 --directory /scratch
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"{device!r} is neither cpu nor cuda", where="--device", hint="Choose one of the two.")
    from pipeline.bench.checkpoint import Options, measure, save

    options = Options(model, batch, side, prototypes, saves, "cuda" if device == "cuda" else "cpu", directory)
    result = measure(options, tell=lambda sentence: print(sentence, file=sys.stderr))
    stem = out or Path("bench-results") / f"checkpoint-{device}-{datetime.now(UTC):%Y%m%d-%H%M}"
    document, page = save(result, options, stem, shlex.join(["fovea", *sys.argv[1:]]))
    print(page.read_text())
    print(f"wrote {document} and {page}", file=sys.stderr)


@app.command()
def flops(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG]...", help="Configs; by default the standard model sizes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Count the FLOPs per sample of a step with torch's counter and by formula; needs no GPU and no data.

    [b]Example[/b]

    fovea bench flops dinov2/vitl14_long clip/vit_b32_cc12m
    """
    from pipeline.bench.flops import cost, markdown
    from pipeline.config.load import load

    known = ("dinov2/vits16_node", "dinov2/vitb16_node", "dinov2/vitl16_short", "clip/vit_b32_cc12m", "clip/vit_b16_cc12m")
    costs = []
    for name in names or known:
        print(f"counting {name}", file=sys.stderr)
        costs.append(cost(name, load(name, ["data.shards=none.tar"]).config))
    _keep("flops", out, lambda machine, command: markdown(costs, machine, command), {"costs": [asdict(one) for one in costs]})


@app.command()
def heads(
    prototypes: Annotated[int, typer.Option(min=2, help="Prototypes of the head.")] = 65536,
    samples: Annotated[int, typer.Option(min=1, help="Samples, of ten crops each.")] = 16,
    masked: Annotated[int, typer.Option(min=1, help="Masked patches in total.")] = 600,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of logits per chunk; by default the training default.")] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--fp32", help="Precision of matrix products; by default bf16 on cuda.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Benchmark prototype heads, Sinkhorn and losses in chunks against the plain formulas with full logits: time and memory.

    On a GPU with Triton, its kernels are compared with the same chunks in plain torch.

    [b]Example[/b]

    fovea bench heads --prototypes 131072 --masked 5000 --device cuda
    """
    from pipeline.bench.heads import Options, markdown, measure

    low = device == "cuda" if bf16 is None else bf16
    options = Options(prototypes, samples=samples, masked=masked, rows=rows, rounds=rounds, device=_device(device), bf16=low)
    result = measure(options, tell=_tell)
    _keep("heads", out, lambda machine, command: markdown(result, options, machine, command), asdict(result))


@app.command()
def step(
    method: Annotated[
        str, typer.Option(help="clip, against open_clip; dinov2, against the official code if installed.")
    ] = "clip",
    model: Annotated[
        str | None, typer.Option(help="clip: B-32, B-16, L-16, tiny; dinov2: S-14, B-14, L-14, -16, tiny-14.")
    ] = None,
    batch: Annotated[int, typer.Option(min=2, help="Samples per step.")] = 8,
    caption: Annotated[int, typer.Option(min=3, max=77, help="Tokens per caption, including start and end tokens.")] = 20,
    prototypes: Annotated[int, typer.Option(min=2, help="Prototypes of DINOv2's head.")] = 65536,
    drop: Annotated[float, typer.Option(min=0.0, max=0.9, help="Drop rate of DINOv2's stochastic depth.")] = 0.3,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also measure our step with compiled blocks.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="As --compiled, replayed as CUDA graphs.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute under bf16 autocast.")] = False,
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Benchmark a training step against other implementations with the same weights and batch; the losses are compared first.

    The official DINOv2: pip install --no-deps dinov2 xformers && pip install omegaconf fvcore

    [b]Examples[/b]

    fovea bench step --model B-16 --batch 512 --device cuda --bf16

    fovea bench step --method dinov2 --model L-14 --batch 64 --device cuda --bf16 --compiled
    """
    from pipeline.bench.step import METHODS, Options, markdown, measure

    if graphs and device != "cuda":
        raise ConfigError("CUDA graphs need a CUDA device", where="--graphs", hint="Leave it out, or measure on cuda.")
    if method not in METHODS:
        raise ConfigError(f"there is no step of {method!r}", where="--method", hint=f"Choose of {', '.join(METHODS)}.")
    chosen = model or {"clip": "B-32", "dinov2": "S-14"}[method]
    numbers = {"batch": batch, "caption": caption, "prototypes": prototypes, "drop": drop, "rounds": rounds}
    options = Options(method, chosen, compiled=compiled, graphs=graphs, device=_device(device), bf16=bf16, **numbers)  # type: ignore[arg-type]
    result = measure(options, tell=_tell)
    _keep(f"step-{method}", out, lambda machine, command: markdown(result, options, machine, command), asdict(result))


@app.command()
def comm(
    width: Annotated[int, typer.Option(min=16, help="Width of the student's layers.")] = 256,
    depth: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 4,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks on this host.")] = 2,
    accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Count the collectives and bytes per step of each ZeRO stage on gloo ranks, and compare them with theory.

    [b]Example[/b]

    fovea bench comm --ranks 2 --accumulation 2
    """
    from pipeline.bench.comm import Options, markdown, measure

    options = Options(width, depth, ranks, accumulation)
    found = measure(options, tell=_tell)
    document = {"options": asdict(options), "stages": [asdict(one) for one in found]}
    _keep("comm", out, lambda machine, command: markdown(found, options, machine, command), document)


@app.command()
def loop(
    steps: Annotated[int, typer.Option(min=2, help="Measured steps.")] = 200,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between two lines of the journal.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Measure the overhead of the training loop: the trainer, the engine alone and plain torch in turns, on a minimal model.

    [b]Example[/b]

    fovea bench loop
    """
    from pipeline.bench.loop import Options, markdown, measure

    options = Options(steps, log_every)
    result = measure(options, tell=_tell)
    _keep("loop", out, lambda machine, command: markdown(result, options, machine, command), asdict(result))


@app.command()
def resume(
    width: Annotated[int, typer.Option(min=16, help="Width of the student's layers.")] = 512,
    depth: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Compare a resume from a checkpoint with a fresh start, each up to the end of its first step.

    [b]Example[/b]

    fovea bench resume --width 1024
    """
    from pipeline.bench.plain import Size
    from pipeline.bench.resume import Options, markdown, measure

    options = Options(Size(width, depth, 256), rounds)
    result = measure(options, tell=_tell)
    _keep("resume", out, lambda machine, command: markdown(result, options, machine, command), asdict(result))


@app.command()
def determinism(
    model: Annotated[str, typer.Option(help="Size of the ViT: tiny, small, base or large.")] = "tiny",
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 8,
    side: Annotated[int, typer.Option(min=32, help="Side of the global crops, pixels; a multiple of 16.")] = 96,
    prototypes: Annotated[int, typer.Option(min=16, help="Prototypes per head.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Measure the cost of train.deterministic: DINOv2's step with and without it, in turns.

    [b]Example[/b]

    fovea bench determinism --device cuda --model large --batch 32 --side 224
    """
    from pipeline.bench.checkpoint import MODELS, Options
    from pipeline.bench.determinism import measure, page

    if model not in MODELS:
        raise ConfigError(f"{model!r} is no size", where="--model", hint=f"Choose of {', '.join(MODELS)}.")
    if _device(device) == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, and is deterministic only with it
    options = Options(model, batch, side, prototypes, device="cuda" if device == "cuda" else "cpu")
    cases = measure(options, rounds=rounds, tell=_tell)
    document = {"cases": {name: asdict(case) for name, case in cases.items()}}
    _keep("determinism", out, lambda machine, command: page(cases, options, machine, command), document)


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"{name!r} is neither cpu nor cuda", where="--device", hint="Choose one of the two.")
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device here", where="--device", hint="Run it where there is one, or measure cpu.")
    return name


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _keep(name: str, out: Path | None, page: Any, document: dict[str, Any]) -> None:
    """Print the page, and save it with all figures."""
    stem = _stem(name, out)
    print(_written(stem, page, document))
    _tell(f"wrote {stem.with_suffix('.md')}")


def _collected(
    name: str, out: Path | None, runs: Iterable[Any], line: Any, page: Any, key: str = "runs", **more: Any
) -> list[Any]:
    """Report each run as it ends and save all results so far: a killed benchmark loses only the current run."""
    stem, found, text = _stem(name, out), list[Any](), ""
    for one in runs:
        _tell(line(one))
        found.append(one)
        text = _written(stem, partial(page, found), {**more, key: [asdict(each) for each in found]})
    print(text)
    _tell(f"wrote {stem.with_suffix('.md')}")
    return found


def _stem(name: str, out: Path | None) -> Path:
    return out or Path("bench-results") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M}"


def _written(stem: Path, page: Any, document: dict[str, Any]) -> str:
    from pipeline.bench.machine import describe

    command, machine = shlex.join(["fovea", *sys.argv[1:]]), describe()
    text: str = page(machine, command)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(dumps({"command": command, "machine": machine, **document}, indent=2) + "\n")
    return text


@app.command()
def methods(
    names: Annotated[
        list[str] | None, typer.Argument(help="Methods; by default all that have a config for synthetic scenes.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.05, help="Minutes of training per method.")] = 2.0,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples per method, instead of minutes.")] = None,
    shards: Annotated[str | None, typer.Option(help="Training shards of scenes; generated by default.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks per run.")] = 2,
    directory: Annotated[Path, typer.Option(help="Output directory of the runs, which should be new.")] = Path(
        "runs/bench-methods"
    ),
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Train each method on the same synthetic scenes for the same time or number of samples, and compare k-NN and zero-shot.

    [b]Examples[/b]

    fovea bench methods --minutes 2

    fovea bench methods simclr byol --minutes 5
    """
    from pipeline.bench.methods import configs, line, markdown, measure

    known = configs()
    for name in names or ():
        if name not in known:
            raise ConfigError(f"there is no scenes config of {name!r}", where="methods", hint=f"Choose of {', '.join(known)}.")
    shards = shards or _scenes(directory)
    each = f"{minutes:g} minutes" if samples is None else f"{samples} samples"
    runs = measure(names or list(known), shards, minutes=minutes, samples=samples, ranks=ranks, directory=directory)
    _collected("methods", out, runs, line, partial(markdown, each=each), "rows", each=each)


@app.command()
def readme(file: Annotated[Path, typer.Argument(help="The README file.")] = Path("README.md")) -> None:
    """Update the benchmark table in the README from the results in pipeline/bench/results."""
    from pipeline.bench.summary import written

    try:
        file.write_text(written(file.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"has no place for the table ({error})", where=str(file), hint="Give fovea's own README.md.") from error


@app.command()
def collapse(
    questions: Annotated[list[str] | None, typer.Argument(help="byol, dino, mocov2, simclr, logo; by default all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples per run.")] = 24_000,
    shards: Annotated[str | None, typer.Option(help="Training shards of scenes; generated by default.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks per run.")] = 2,
    directory: Annotated[Path, typer.Option(help="Output directory of the runs, which should be new.")] = Path(
        "runs/bench-collapse"
    ),
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Ablate what prevents collapse: BYOL without predictor, DINO without centring or sharpening, small batches, repelled crops.

    [b]Examples[/b]

    fovea bench collapse byol

    fovea report runs/bench-collapse/dino-*
    """
    from pipeline.bench.collapse import QUESTIONS, line, measure, page
    from pipeline.reports.curves import page as curves

    for name in questions or ():
        if name not in QUESTIONS:
            raise ConfigError(f"{name!r} is no question", where="questions", hint=f"Choose of {', '.join(QUESTIONS)}.")
    runs = measure(questions or QUESTIONS, shards or _scenes(directory), samples=samples, ranks=ranks, directory=directory)
    found = _collected("collapse", out, runs, line, page, "trials")
    (directory / "curves.html").write_text(curves(found))
    _tell(f"wrote {directory / 'curves.html'}")


@app.command()
def dense(
    samples: Annotated[int, typer.Option(min=1, help="Samples per run.")] = 64_000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method, with seeds from 0.")] = 3,
    shards: Annotated[str | None, typer.Option(help="Training shards of scenes; generated by default.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks per run.")] = 2,
    directory: Annotated[Path, typer.Option(help="Output directory of the runs, which should be new.")] = Path(
        "runs/bench-dense"
    ),
    out: Annotated[Path | None, typer.Option(help="Output path of the results, without extension.")] = None,
) -> None:
    """Compare the dense features of DetailCLIP and CLIP after equal samples, by linear segmentation of synthetic scenes.

    [b]Examples[/b]

    fovea bench dense --samples 25600 --seeds 3
    """
    from pipeline.bench.dense import line, measure, page

    runs = measure(shards or _scenes(directory), samples=samples, seeds=range(seeds), ranks=ranks, directory=directory)
    _collected("dense", out, runs, line, page)


def _scenes(directory: Path) -> str:
    """Generate training scenes, with validation shards beside them."""
    from pipeline.data.pack.synthetic import write

    write(directory / "scenes", train=8000, val=1000)
    return f"{directory / 'scenes'}/*train-*.tar"
