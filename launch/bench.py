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


@app.callback()
def _bench() -> None:
    """Keeps ``data`` a verb of its own while it is the only one."""


@app.command()
def data(
    shards: Annotated[list[str] | None, typer.Option(help="Shards to measure on; by default pictures are packed for it.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs to pack; by default scenes are drawn.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Pictures of a round.")] = 512,
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
