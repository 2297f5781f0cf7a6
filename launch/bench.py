"""``fovea bench``: how fast the parts are, against what one would use without them."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Measure how fast the parts are, against their rivals in the same run.")


@app.command()
def data(
    shards: Annotated[list[str] | None, typer.Option(help="Shards to measure on; by default pictures are packed for it.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs to pack; by default scenes are drawn.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Pictures of a round.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which the best counts.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of a micro-batch.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Threads of decoder and DALI.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes of torchvision's DataLoader.")] = 0,
    world: Annotated[int, typer.Option(min=1, help="Ranks to play the first of.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, or cuda for pictures a second on the GPU.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="One round of 64 pictures: to see that it works.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the results go, without ending.")] = None,
) -> None:
    """Reading, decoding and augmenting against torchvision's DataLoader and DALI's own reader.

    [b]Examples[/b]

    fovea bench data --photos ~/pictures

    fovea bench data --shards '/data/train-{000..003}.tar' --threads 4 --out results/mine
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"{device!r} is neither cpu nor cuda", where="--device", mend="Choose one of the two.")
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
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 16,
    side: Annotated[int, typer.Option(min=32, help="Side of the global crops, pixels; a multiple of 16.")] = 224,
    prototypes: Annotated[int, typer.Option(min=16, help="Prototypes of each head.")] = 65536,
    saves: Annotated[int, typer.Option(min=1, help="Checkpoints of each kind, of which the median counts.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    directory: Annotated[Path | None, typer.Option(help="Folder on the disk to be measured.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the results go, without ending.")] = None,
) -> None:
    """How long training stands still for a checkpoint, waiting for it or going on beside it, and how long loading takes.

    [b]Examples[/b]

    fovea bench checkpoint

    fovea bench checkpoint --model large --device cuda --batch 32 --directory /scratch
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"{device!r} is neither cpu nor cuda", where="--device", mend="Choose one of the two.")
    from pipeline.bench.checkpoint import Options, measure, save

    options = Options(model, batch, side, prototypes, saves, "cuda" if device == "cuda" else "cpu", directory)
    result = measure(options, tell=lambda sentence: print(sentence, file=sys.stderr))
    stem = out or Path("bench-results") / f"checkpoint-{device}-{datetime.now(UTC):%Y%m%d-%H%M}"
    document, page = save(result, options, stem, shlex.join(["fovea", *sys.argv[1:]]))
    print(page.read_text())
    print(f"wrote {document} and {page}", file=sys.stderr)


@app.command()
def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Methods; by default all that have a config for scenes.")] = None,
    minutes: Annotated[float, typer.Option(min=0.05, help="Minutes of training for each method.")] = 2.0,
    shards: Annotated[str | None, typer.Option(help="Training shards of scenes; by default they are drawn.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of a run.")] = 2,
    directory: Annotated[Path, typer.Option(help="Folder of the runs, which should be new.")] = Path("runs/bench-methods"),
    out: Annotated[Path | None, typer.Option(help="Where the results go, without ending.")] = None,
) -> None:
    """What each method learns of the same drawn scenes in the same time: k-NN and zero-shot in one table.

    [b]Examples[/b]

    fovea bench methods --minutes 2

    fovea bench methods simclr byol --minutes 5
    """
    from pipeline.bench.methods import Row, configs, line, measure, save

    known = configs()
    for name in names or ():
        if name not in known:
            raise ConfigError(f"there is no scenes config of {name!r}", where="methods", mend=f"Choose of {', '.join(known)}.")
    if shards is None:
        from pipeline.data.scenes import write

        write(directory / "scenes", train=8000, val=1000)
        shards = f"{directory / 'scenes'}/*train-*.tar"
    stem = out or Path("bench-results") / f"methods-{datetime.now(UTC):%Y%m%d-%H%M}"
    document = page = stem
    rows: list[Row] = []
    for row in measure(names or list(known), shards, minutes=minutes, ranks=ranks, directory=directory):
        print(line(row), file=sys.stderr)
        rows.append(row)
        document, page = save(rows, stem, shlex.join(["fovea", *sys.argv[1:]]), minutes)
    print(page.read_text())
    print(f"wrote {document} and {page}", file=sys.stderr)
