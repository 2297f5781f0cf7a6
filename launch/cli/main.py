"""The command ``fovea``. Each subcommand imports its dependencies only when it runs, so that ``--help`` is fast."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape

from launch.cli import adapt, embed, replay, shards
from launch.cli import slurm as cluster
from launch.cli.bench_learning import app as bench
from launch.cli.checkpoint import app as checkpoint
from launch.cli.choices import Device, ExportFormat, Method, Network, local_only, output_stem, size_option
from launch.cli.config import app as config
from launch.cli.mlflow import app as mlflow
from launch.cli.sweep import app as sweep
from launch.streams import open_streams
from launch.terminal import Terminal, clean_logs
from pipeline.errors import ConfigError, FoveaError, of_system
from pipeline.runtime.interpreter import end_process, exit_code

if TYPE_CHECKING:
    from pipeline.config.load import Loaded

app = typer.Typer(
    name="fovea",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pretrain vision models from tar shards.\n\n"
    "[b]See it work:[/b]          fovea demo\n\n"
    "[b]Train on your shards:[/b] fovea train dinov2/cifar10_vit_tiny data.shards='/data/train-{000..099}.tar'\n\n"
    "[b]Change any setting:[/b]   fovea train my.yaml schedule.lr.peak=1e-3 train.global_batch_size=512\n\n"
    "[b]Which settings are there?[/b]  fovea config show dinov2/cifar10_vit_tiny",
)
_DATA, _BENCH = "Data, settings and checkpoints", "Benchmarks"

ConfigArgument = shards.ConfigArgument
Overrides = shards.Overrides
_debug = False
_command_line: list[str] = []  # the command line, for ranks that run the same command


def _version(requested: bool) -> None:
    if requested:
        from pipeline.runtime.versions import fovea_version

        print(f"fovea {fovea_version()}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    global _debug
    _debug = _debug or debug


@app.command(short_help="Quick demo: train, interrupt, resume and evaluate on synthetic data.")
def demo(
    minutes: Annotated[float, typer.Option(min=0.1, help="Approximate training time, minutes.")] = 5.0,
    method: Annotated[Method, typer.Option(help="Pretraining method.")] = Method("dinov2"),  # noqa: B008
    data: Annotated[str | None, typer.Option(metavar="SHARDS", help="Your own shards instead of synthetic scenes.")] = None,
    val: Annotated[str | None, typer.Option(metavar="SHARDS", help="Labelled validation shards for --data.")] = None,
    directory: Annotated[Path, typer.Option(help="Output directory.", callback=local_only)] = Path("runs/demo"),
) -> None:
    """Generate a data set, train on it, interrupt and resume the run, and show the results.

    [b]Examples[/b]

    fovea demo

    fovea demo --minutes 2

    fovea demo --data 'cifar10/train-{00000..00009}.tar' --val 'cifar10/val-{00000..00001}.tar'
    """
    from launch.cli.demo import run

    run(minutes=minutes, method=str(method), data=data, directory=directory, val=val)


@app.command(short_help="Start or resume a training run.")
def train(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Start a training run, or resume it from its newest checkpoint.

    [b]Examples[/b]

    fovea train dinov2/cifar10_vit_tiny data.shards='cifar10/train-{00000..00009}.tar'

    fovea train my.yaml launch.num_processes=2 train.duration='10 epochs' run.name=trial

    On Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 the run saves a checkpoint and stops; the same command resumes it. To start from
    scratch, choose another run.directory.
    """
    loaded = _load(config, overrides)
    from launch.cli.train import run

    raise typer.Exit(run(loaded))


adapt.enter(app, _command_line)


@app.command("eval", short_help="Evaluate a run, a checkpoint or pretrained weights.")
def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CHECKPOINT|WEIGHTS",
            help="A run, one of its checkpoints, or weights of timm, Hugging Face or open_clip.",
        ),
    ],
    overrides: Overrides = None,
    knn: Annotated[bool, typer.Option("--knn", help="k-nearest-neighbour classification.")] = False,
    linear: Annotated[
        bool, typer.Option("--linear", help="Linear probe: a grid of learning rates and layers, trained by gradient descent.")
    ] = False,
    logistic: Annotated[bool, typer.Option("--logistic", help="Logistic regression (scikit-learn).")] = False,
    segmentation: Annotated[bool, typer.Option("--segmentation", help="Linear segmentation on patch tokens (mIoU).")] = False,
    robustness: Annotated[bool, typer.Option("--robustness", help="Universal adversarial perturbation.")] = False,
    zeroshot: Annotated[
        Path | None, typer.Option(metavar="CLASSES", help="Zero-shot classification; a file with one class name per line.")
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompt templates for --zeroshot, one per line, each containing {}; SLIP's seven by default."
        ),
    ] = None,
    retrieval: Annotated[bool, typer.Option(help="Image-to-text and text-to-image retrieval.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An evaluator by the name of its section in evaluation; repeatable.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also evaluate the network as the run began with it, and raw pixels.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Evaluate each checkpoint as it is written, until the run's last.")
    ] = False,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="timm model name of a weights file.")] = None,
    size: Annotated[str | None, size_option("for pretrained weights")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the scores to this JSON file.", callback=local_only)
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; by default one per GPU, or 1 without GPUs.")
    ] = None,
    between: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES", help="Also at weights between the run's initial ones (0) and these (1): 0,0.25,0.5,0.75,1."
        ),
    ] = None,
    track: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow server, for pretrained weights or instead of the run's own.")
    ] = None,
) -> None:
    """Evaluate weights. By default: k-NN, compared with the network as the run began with it, and with raw pixels.

    The section evaluation of the run's settings configures the evaluators and their data; KEY=VALUE overrides it. The scores of
    a run are written to RUN/evaluations/CHECKPOINT.json and logged to its own MLflow run as eval/.... The ranks may also be
    started by torchrun or srun.

    [b]Examples[/b]

    fovea eval runs/cifar10_vit_tiny

    fovea eval runs/cifar10_vit_tiny --linear --logistic evaluation.linear.epochs=20

    fovea eval runs/cifar10_vit_tiny/checkpoints/step_000003750

    fovea eval runs/clip_cifar10 --zeroshot classes.txt --retrieval

    fovea eval timm:vit_small_patch16_224 --knn data.shards='train-*.tar' evaluation.knn.val_shards='val-*.tar'

    fovea eval runs/vitl16 --linear --ranks 8 --track http://mlflow:5000
    """
    flags = {"knn": knn, "linear": linear, "logistic": logistic, "segmentation": segmentation, "robustness": robustness}
    flags |= {"zeroshot": zeroshot is not None, "retrieval": retrieval}
    names = [name for name, selected in flags.items() if selected]
    extra = [f"evaluation.zeroshot.class_names={zeroshot}"] if zeroshot is not None else []
    extra += [f"evaluation.zeroshot.templates={templates}"] if zeroshot is not None and templates is not None else []
    from launch.cli.eval import EvalOptions, shares_of
    from launch.cli.eval import run as evaluate_target
    from pipeline.config.sizes import parse_size

    evaluators = tuple(dict.fromkeys([*names, *(only or ())]))
    options = EvalOptions(evaluators, baselines, watch, model, parse_size(size), output, ranks, track, shares_of(between))
    raise typer.Exit(evaluate_target(run, [*(overrides or ()), *extra], options, _command_line))


@app.command(short_help="Export weights for timm, Hugging Face, open_clip or ONNX.")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, or one of its checkpoints.")],
    to: Annotated[ExportFormat, typer.Option(help="Export format.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Output directory; RUN/export/FORMAT by default.", callback=local_only)
    ] = None,
    network: Annotated[
        Network, typer.Option(help="Network to export; auto selects the one that the method trains for use.")
    ] = Network.AUTO,
    student: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which student to export, if several were distilled together.")
    ] = None,
    size: Annotated[str | None, size_option("the training size by default")] = None,
    licence: Annotated[
        str, typer.Option("--license", metavar="NAME", help="Licence of the weights, for the model card.")
    ] = "unknown",
    best: Annotated[bool, typer.Option("--best", help="Export the best checkpoint instead of the newest.")] = False,
    interpolate: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Weights this share of the way from the run's initial ones (0) to these (1)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite existing files.")] = False,
    register: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also register the export as a new version of this MLflow model.")
    ] = None,
) -> None:
    """Export the trained weights in another library's format, with a model card and preprocessing settings.

    [b]Examples[/b]

    fovea export runs/vitl16 --to timm

    fovea export runs/cifar10_vit_tiny --to onnx

    fovea export runs/clip_cifar10 --to open_clip --out ./clip --license apache-2.0
    """
    from launch.cli.export import run as write
    from pipeline.config.sizes import parse_size

    options: dict[str, Any] = {"out": out, "network": network.value, "student": student, "size": parse_size(size)}
    options |= {"license_": licence, "interpolate": interpolate}
    raise typer.Exit(write(run, to=str(to), best=best, force=overwrite, register=register, **options))


@app.command(short_help="Check that everything works on this machine, and measure how fast.")
def prove(
    device: Annotated[Device, typer.Option(help="cuda, or cpu at toy size.")] = Device.CUDA,
    stages: Annotated[
        str, typer.Option(metavar="NAMES", help="Stages, separated by commas; results of others are kept.")
    ] = "all",
    first: Annotated[str, typer.Option("--from", metavar="NAME", help="First stage; results of earlier ones are kept.")] = "",
    toy: Annotated[bool | None, typer.Option("--toy/--full-size", help="Minimal sizes; the default on the CPU.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Directory of photographs; by default synthetic scenes.")] = None,
    out: Annotated[
        Path, typer.Option(metavar="PATH", help="Output path of the page, without extension.", callback=output_stem)
    ] = Path("proof"),
) -> None:
    """Check that this machine trains correctly, before training on it.

    Stages: imports, decode, stream, kernels, methods, run, speed, data, small, ranks. Each is a process of its own and
    compares numbers with the CPU's or measures a speed. A failure does not end the others; the exit code is then 1.

    [b]Examples[/b]

    fovea prove

    fovea prove --from speed

    fovea prove --device cpu --stages imports,decode
    """
    from launch.cli.prove import prove as run

    raise typer.Exit(run(device, stages, first, toy, photos, out))


@app.command(short_help="Repeat a config with several seeds and compare it with the record.")
def reproduce(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A config file or name.")] = None,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    directory: Annotated[
        Path | None, typer.Option(help="Output directory of the runs; runs/reproduce/CONFIG by default.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--ledger", metavar="FILE", help="The ledger; configs/ledger.jsonl by default.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List what was recorded and what it costs.")] = False,
    headers: Annotated[bool, typer.Option("--headers", help="Write the records into the headers of the configs.")] = False,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with the curves of all records.", callback=local_only)
    ] = None,
) -> None:
    """Train a config with several seeds, one after the other, and compare the result with the record of that config.

    The result is added to the ledger as a line of JSON. The same command continues after an interruption; seeds that are
    finished are not repeated. The exit code is 1 if the result is below the record by more than chance.

    [b]Examples[/b]

    fovea reproduce --list

    fovea reproduce simclr/cifar10_small data.shards='cifar10/train-{00000..00009}.tar'
    """
    from launch.cli import reproduce as command
    from pipeline.bench.reproduction.ledger import default_file

    target = file or default_file()
    if page is not None:
        raise typer.Exit(command.write_page(target, page))
    if show or headers:
        raise typer.Exit(command.list_records(target) if show else command.write_headers(target))
    if config is None:
        raise ConfigError("no config is named", where="fovea reproduce", hint="Name one; `fovea reproduce --list` shows some")
    folder = directory or Path("runs") / "reproduce" / Path(config).with_suffix("").as_posix().replace("/", "_").strip("._")
    order = command.Order(config, tuple(overrides or ()), tuple(range(seeds)), folder, target)
    raise typer.Exit(command.run(order))


@app.command(short_help="Compare runs in one HTML page.")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Output HTML file.", callback=local_only)] = Path("report.html"),
) -> None:
    """Compare runs in one HTML page: curves, scores, throughput, interruptions, losses, environment, settings.

    [b]Example[/b]

    fovea report runs/first runs/second --out comparison.html
    """
    from pipeline.reports.comparison import run

    raise typer.Exit(run(runs, out))


@app.command(short_help="Visualize the network's features on your own images.")
def visualize(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, or one of its checkpoints.")],
    files: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    text: Annotated[list[str] | None, typer.Option(help="Text to locate in the images, for methods with a text encoder.")] = None,
    size: Annotated[str | None, size_option("twice the training size by default")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Output HTML file.", callback=local_only)] = Path("images.html"),
) -> None:
    """Visualize your own images: PCA of patch features, attention maps, similarity to texts.

    [b]Example[/b]

    fovea visualize runs/clip_scenes photo.jpg other.png --text "a red circle"
    """
    from pipeline.config.sizes import parse_size
    from pipeline.reports.visualize import run as draw

    raise typer.Exit(draw(run, files, out=out, texts=text or [], size=parse_size(size)))


@app.command(short_help="Estimate memory, time and cost before a run.", rich_help_panel=_DATA)
def estimate(
    config: ConfigArgument,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Number of GPUs; by default as configured or detected.")
    ] = None,
    gpu_memory_gb: Annotated[float | None, typer.Option(min=0.1, help="Memory of one GPU in GB; 80 by default.")] = None,
    cluster: Annotated[
        str, typer.Option("--cluster", "-c", help="Cluster profile: sets the GPU type and adds hours and costs to the estimate.")
    ] = "",
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1, help="Assumed share of the GPU's peak FLOPS that a step reaches.")
    ] = 0.35,
    dataset_size: Annotated[
        int | None, typer.Option(min=1, help="Samples per epoch, for durations in epochs; by default counted from the shards.")
    ] = None,
    index_shards: Annotated[int, typer.Option(min=0, help="Shards to index to say what data cost, without an index.")] = 0,
) -> None:
    """Estimate GPU memory by ZeRO stage and number of GPUs, recommend a stage; estimate time, cost, checkpoint interval, data.

    [b]Examples[/b]

    fovea estimate dinov2/cifar10_vit_tiny data.shards=/data/train.tar --gpus 8 --gpu-memory-gb 80

    fovea estimate dinov2/vitl16_short data.shards=none.tar --cluster one_node_8gpu --dataset-size 1281167
    """
    loaded = _load(config, overrides)
    from launch.cli.estimate import cost, measure, ranks_of, run
    from launch.cli.estimate_data import data
    from launch.cli.estimate_interval import interval, nodes_of, snapshots
    from launch.slurm import profile as profiles

    site, sizes = profiles.load(cluster) if cluster else None, measure(loaded.config)
    ranks = ranks_of(loaded.config, gpus or (site.world if site else None))
    code = run(loaded.config, sizes, ranks=ranks, gigabytes=gpu_memory_gb or (site.gpu_memory_gb if site else 80.0))
    if site and (total := cost(loaded.config, site, ranks=ranks, efficiency=efficiency, samples=dataset_size)):
        interval(loaded.config, site, total, sizes, ranks=ranks)
    snapshots(loaded.config, site, sizes, ranks=ranks)
    data(loaded.config, ranks=ranks, nodes=nodes_of(site, ranks), shards=index_shards, samples=dataset_size)
    raise typer.Exit(code)


def _load(name: str, overrides: Sequence[str] | None) -> Loaded:
    from pipeline.config.load import load

    return load(name, overrides or ())


# Added last: --help lists the commands in the order in which they are added.
embed.enter(app, _command_line)
replay.enter(app)
app.add_typer(shards.app, name="shards", rich_help_panel=_DATA, short_help="Pack, index, verify, curate and inspect shards.")
app.add_typer(config, name="config", rich_help_panel=_DATA, short_help="Show and check configs.")
app.add_typer(checkpoint, name="checkpoint", rich_help_panel=_DATA, short_help="List, verify, inspect and convert checkpoints.")
app.add_typer(mlflow, name="mlflow", rich_help_panel=_DATA, short_help="Send the journals of runs to MLflow.")
cluster.enter(app)
app.add_typer(sweep, name="sweep", short_help="Train a config with a grid or a list of settings.")
app.add_typer(bench, name="bench", rich_help_panel=_BENCH, short_help="Measure speed and memory against baselines.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A :class:`FoveaError` becomes one message on stderr and the error's exit code."""
    global _debug
    open_streams()
    clean_logs()
    command = list(sys.argv[1:] if arguments is None else arguments)
    _debug, _command_line[:] = "--debug" in command, command
    try:
        # DeepSpeed's launcher also passes --local_rank in front of the subcommand; the environment holds it too.
        app([word for word in command if word != "--debug" and not word.startswith("--local_rank=")], prog_name="fovea")
    except FoveaError as error:
        _refused(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        known = of_system(error)
        if known is None:
            raise
        _refused(known)


def run() -> NoReturn:
    """Entry of the command ``fovea``: :func:`main`, after which the process ends at once."""
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = exit_code(stop)
    end_process(code)


def _refused(error: FoveaError) -> NoReturn:
    if _debug:
        traceback.print_exc()
    Terminal(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]fovea:[/] {escape(str(error))}")
    sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
