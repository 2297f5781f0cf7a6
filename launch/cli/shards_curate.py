"""``fovea shards dedup``, ``balance``, ``retrieve`` and ``select``: which samples are used, as a selection. Imports lazily."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from launch.cli.choices import BalanceMode, CoarseLevels, RetrieveMode, local_only
from launch.cli.shards_index import part_of
from pipeline.errors import ConfigError, FoveaError
from pipeline.masking import printable

if TYPE_CHECKING:
    from pipeline.data.curation.outcome import Outcome
    from pipeline.data.curation.vectors import Vectors
    from pipeline.data.index.manifest import Manifest

EmbeddingsArgument = Annotated[
    Path, typer.Argument(metavar="EMBEDDINGS", help="Folder that fovea embed wrote.", callback=local_only)
]
OutOption = Annotated[Path, typer.Option(metavar="FILE", help="The selection to write: FILE.parquet.", callback=local_only)]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the clusters and of every choice.")]
ThreadsOption = Annotated[int | None, typer.Option("--workers", min=1, help="Number of threads; by default one per core.")]
WorkOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of intermediate results; by default FILE.work, removed at the end.", callback=local_only
    ),
]
PreviewOption = Annotated[
    Path | None, typer.Option(metavar="PAGE", help="Write an HTML page with examples.", callback=local_only)
]
ShardsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--shards", metavar="SHARDS", help="The embedded shards, for the images of --preview; may be repeated for other sets."
    ),
]
PartOption = Annotated[
    str | None,
    typer.Option(help="Do only one part of the work, such as 3/16, into a common --work; see the example of a Slurm array."),
]


def dedup(
    embeddings: EmbeddingsArgument,
    out: OutOption,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least cosine of near-duplicates; try with --preview.")] = 0.95,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Embeddings of an evaluation set: remove what is near them.", callback=None),
    ] = None,
    against_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least cosine for --against; by default --threshold.")
    ] = None,
    only_against: Annotated[
        bool, typer.Option("--only-against", help="Keep duplicates within the set; remove only what is near --against.")
    ] = False,
    clusters: Annotated[
        int | None, typer.Option(min=1, help="Number of clusters within which samples are compared; by default one for 4096.")
    ] = None,
    probes: Annotated[int, typer.Option(min=1, max=64, help="Nearest clusters in which each sample is compared.")] = 3,
    seed: SeedOption = 0,
    workers: ThreadsOption = None,
    part: PartOption = None,
    work: WorkOption = None,
    preview: PreviewOption = None,
    shards: ShardsOption = None,
) -> None:
    """Select one sample of each group of near-duplicates, and none that is near an evaluation set.

    Duplicates are samples with equal bytes, or whose embeddings have a cosine of at least --threshold, directly or over others.
    Kept is the sample with a caption, else the one with most pixels, else with most bytes, else the first. If interrupted, the
    same command continues. The page of --preview shows pairs around the threshold.

    [b]Examples[/b]

    fovea shards dedup embeddings --out unique.parquet --preview pairs.html --shards 'train-*.tar'

    fovea shards dedup embeddings --out clean.parquet --against val-embeddings --against test-embeddings

    fovea train my.yaml data.selection=unique.parquet

    sbatch --array 1-16 --wrap 'fovea shards dedup emb --out u.parquet --work w --part $SLURM_ARRAY_TASK_ID/16' (twice, then
    once without --part)
    """
    from launch.progress import progress_bar
    from pipeline.data.curation.dedup import DedupOptions, dedup

    if only_against and not against:
        raise ConfigError("there is no set to compare with", where="--only-against", hint="Name its embeddings with --against")
    if only_against and part is not None:
        raise ConfigError("only duplicates within the set are found in parts", where="--part", hint="Leave it out")
    _check_files(out, preview)
    vectors, others = _opened(embeddings), [_opened(folder) for folder in against or ()]
    page = _page(preview, shards, vectors)
    options = DedupOptions(
        threshold, threshold if against_threshold is None else against_threshold, probes, clusters, seed, not only_against
    )
    with progress_bar("comparing") as bar:
        outcome = dedup(
            vectors, options, _work(out, work), against=others, workers=workers, part=part_of(part), progress=_staged(bar)
        )
    made = {"threshold": threshold, "against": [str(folder) for folder in against or ()], "probes": probes, "seed": seed}
    made |= {"against_threshold": options.against_threshold, "within": options.within, "clusters": clusters}
    _finish("fovea shards dedup", out, outcome, vectors, made, work, page, others, f"Pairs around the threshold {threshold:g}")


def balance(
    embeddings: EmbeddingsArgument,
    out: OutOption,
    target: Annotated[str, typer.Option(help="Samples of an epoch: a number, or a share such as 50%.")],
    levels: Annotated[
        str,
        typer.Option(
            help="Clusters of each level, the finest first: 4000,400,40. By default four times the square root of the samples, "
            "and the square root of that."
        ),
    ] = "",
    coarse: Annotated[
        CoarseLevels,
        typer.Option(help="Join the nearest clusters to coarser ones, or cluster them by k-means; by default join up to 8192."),
    ] = CoarseLevels.AUTO,
    mode: Annotated[
        BalanceMode, typer.Option(help="Leave samples out, or keep all and let each occur in its share of the epochs.")
    ] = BalanceMode.SUBSET,
    max_weight: Annotated[
        float, typer.Option(min=1, max=1000, help="How often a sample of a small cluster may occur in an epoch.")
    ] = 1.0,
    selection: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Balance only the samples of these selections.")
    ] = None,
    seed: SeedOption = 0,
    workers: ThreadsOption = None,
    part: PartOption = None,
    work: WorkOption = None,
    preview: PreviewOption = None,
    shards: ShardsOption = None,
) -> None:
    """Select samples so that each concept has an equal share: hierarchical k-means and sampling from coarse to fine.

    The idea is that of Vo et al., arXiv 2405.15613; --coarse kmeans clusters as they do. Where a cluster has fewer samples than
    its share, the others get more, or with --max-weight its samples are repeated. If interrupted, the same command continues.

    [b]Examples[/b]

    fovea shards balance embeddings --out balanced.parquet --levels 3000,300,30 --target 50%

    fovea shards balance embeddings --out b.parquet --selection unique.parquet --target 100000 --mode weights --max-weight 4
    """
    from launch.progress import progress_bar
    from pipeline.data.curation.balance import BalanceOptions, balance
    from pipeline.data.curation.kmeans import default_levels

    _check_files(out, preview)
    vectors = _opened(embeddings)
    page = _page(preview, shards, vectors)
    among = _weights(selection, vectors) if selection else None
    available = vectors.total if among is None else int((among > 0).sum())
    sizes = _levels(levels) or default_levels(vectors.total)
    options = BalanceOptions(sizes, _target(target, available), mode.value, max_weight, seed, coarse.value)
    with progress_bar("clustering") as bar:
        outcome = balance(
            vectors, options, _work(out, work), among=among, workers=workers, part=part_of(part), progress=_staged(bar)
        )
    made = {"levels": list(sizes), "target": options.target, "mode": mode.value, "max_weight": max_weight, "seed": seed}
    made["coarse"] = coarse.value
    made["selection"] = [str(file) for file in selection or ()]
    _finish("fovea shards balance", out, outcome, vectors, made, work, page)


def retrieve(
    embeddings: EmbeddingsArgument,
    out: OutOption,
    like: Annotated[Path, typer.Option(metavar="DIR", help="Embeddings of the curated set.", callback=local_only)],
    k: Annotated[int, typer.Option("--k", min=1, max=10_000, help="Images of each query, or of each cluster with a query.")] = 4,
    mode: Annotated[
        RetrieveMode, typer.Option(help="The nearest images of each query, or images of the clusters that have queries.")
    ] = RetrieveMode.NEAREST,
    clusters: Annotated[
        int | None, typer.Option(min=1, help="Number of clusters; by default the square root of the samples.")
    ] = None,
    min_cosine: Annotated[float, typer.Option(min=-1, max=1, help="Least cosine of a query and its images.")] = -1.0,
    seed: SeedOption = 0,
    workers: ThreadsOption = None,
    work: WorkOption = None,
    preview: PreviewOption = None,
    shards: ShardsOption = None,
) -> None:
    """Select the images that are nearest to those of a small curated set (DINOv2, arXiv 2304.07193, section 3).

    [b]Examples[/b]

    fovea shards retrieve web-emb --like curated-emb --out like.parquet --k 4 --preview like.html --shards 'web-*.tar'

    fovea shards retrieve web-emb --like curated-emb --out like.parquet --mode clusters --k 100
    """
    from launch.progress import progress_bar
    from pipeline.data.curation.retrieve import RetrieveOptions, retrieve

    _check_files(out, preview)
    vectors, queries = _opened(embeddings), _opened(like)
    page = _page(preview, shards, vectors)
    options = RetrieveOptions(k, mode.value, clusters, min_cosine, seed)
    with progress_bar("comparing") as bar:
        outcome = retrieve(vectors, queries, options, _work(out, work), workers=workers, progress=_staged(bar))
    made = {"like": str(like), "k": k, "mode": mode.value, "clusters": clusters, "min_cosine": min_cosine, "seed": seed}
    title = "Queries (right) and their nearest images"
    _finish("fovea shards retrieve", out, outcome, vectors, made, work, page, [queries], title)


def select(
    patterns: Annotated[list[str], typer.Argument(metavar="SHARDS...", help="Paths or URLs, with {000..123} or *.")],
    out: OutOption,
    keys: Annotated[
        Path,
        typer.Option(
            metavar="TABLE",
            help="A .csv, .tsv, .jsonl or .parquet file with the columns key and, if wished, weight and shard.",
            callback=local_only,
        ),
    ],
    exclude: Annotated[bool, typer.Option("--exclude", help="Select all samples but those in the table.")] = False,
    index: Annotated[Path | None, typer.Option("--index", help="Directory of the index; by default in your cache.")] = None,
) -> None:
    """Select the samples that a table names, with weights of your own: scores, filters, lists of others.

    A key that occurs in several shards needs the column shard, the base name of the shard. Keys of the table that no sample has
    are counted; too many of them are an error.

    [b]Example[/b]

    fovea shards select '/data/train-*.tar' --keys good.csv --out good.parquet
    """
    from launch.cli.shards_index import build_index
    from pipeline.data.selections.keys import select_keys
    from pipeline.data.settings import DataSettings

    _check_files(out)
    manifest, _ = build_index(DataSettings(shards=tuple(patterns), index=index), None, None, quiet=True)
    info, missing = select_keys(manifest, keys, out, exclude=exclude)
    if missing:
        print(f"{missing} keys of {printable(str(keys))} are those of no sample")
    print(f"{info.samples} of {info.total} samples selected, {info.weight:.0f} in an epoch: {printable(str(out))}")


_Options = ParamSpec("_Options")
_received: list[int] = []  # signals


def _stoppable(command: Callable[_Options, None]) -> Callable[_Options, None]:
    """Lets SIGINT and SIGTERM end a command with one message and exit code 130 or 143, after temporary files are removed."""

    @functools.wraps(command)
    def run(*arguments: _Options.args, **options: _Options.kwargs) -> None:
        _received.clear()
        stopping = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, _stop) for number in stopping}
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            print("fovea: stopped; the same command continues", file=sys.stderr, flush=True)
            raise typer.Exit(128 + (_received[0] if _received else signal.SIGINT)) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return run


def _stop(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt


def add(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (dedup, balance, retrieve, select):
        app.command(command.__name__)(_stoppable(command))


def _opened(folder: Path) -> Vectors:
    from pipeline.data.curation.vectors import Vectors
    from pipeline.data.embeddings.reader import Embeddings

    return Vectors.of(Embeddings.open(folder))


def _check_files(out: Path, preview: Path | None = None) -> None:
    """Refuses what could not be written at the end, and to replace anything but a selection."""
    from pipeline.data.selections.file import Selection
    from pipeline.data.storage.parquet import open_pyarrow

    open_pyarrow(str(out))
    for path, option in ((out, "--out"), (preview, "--preview")):
        if path is not None and path.is_dir():
            raise ConfigError(f"{printable(str(path))} is a folder", where=option, hint="Name a file")
    if out.exists():
        try:
            Selection(out)
        except FoveaError as error:
            raise ConfigError(
                f"{printable(str(out))} exists and is not a selection", where="--out", hint="Choose another file, or remove it"
            ) from error


def _work(out: Path, work: Path | None) -> Path:
    return work or out.with_name(f"{out.name}.work")


def _staged(bar: Callable[[int, int, str], None]) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        if _received:  # a library that was being imported caught the exception
            raise KeyboardInterrupt
        bar(done, total, stage)

    return progress


def _levels(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if any(not part.isdecimal() or not 0 < int(part) < 1 << 31 for part in parts):
        raise ConfigError(f"{text[:60]!r} names no levels", where="--levels", hint="Write numbers of clusters: 3000,300,30")
    return tuple(int(part) for part in parts)


def _target(text: str, available: int) -> int:
    share, number = text.strip().endswith("%"), text.strip().rstrip("%")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    target = 0
    if 0 < value < 1e15:
        target = int(available * value / 100) if share else int(value)
    if share and 0 < value <= 100 and target < 1:
        raise ConfigError(
            f"{text[:40]} of {available} samples are none", where="--target", hint="Write a number, or a larger share"
        )
    if target < 1:
        raise ConfigError(f"{text[:40]!r} names no target", where="--target", hint="Write a number such as 100000, or 50%")
    return target


def _weights(files: Sequence[Path], vectors: Vectors) -> Any:
    """Weights of earlier selections, by position."""
    from pipeline.data.curation.outcome import earlier_weights

    return earlier_weights(files, vectors)


@dataclass(frozen=True)
class _Page:
    """A page to write: its file, and indexes of shards by their fingerprints."""

    out: Path
    manifests: dict[str, Manifest]


def _page(preview: Path | None, shards: list[str] | None, vectors: Vectors) -> _Page | None:
    """Indexes the shards of a page. Only shards that the command line names are read, whatever the embeddings say."""
    from launch.cli.shards_index import build_index
    from pipeline.data.settings import DataSettings

    if preview is None:
        return None
    if not shards:
        raise ConfigError("needs the images", where="--preview", hint="Name the embedded shards: --shards 'train-*.tar'")
    declared = vectors.embeddings.spec.image.channels
    channels = declared.settings if declared is not None else None
    indexed = [build_index(DataSettings(shards=(one,), channels=channels), None, None, quiet=True)[0] for one in shards]
    manifests = {manifest.fingerprint: manifest for manifest in indexed}
    if vectors.embeddings.fingerprint not in manifests:
        raise ConfigError(
            "names other shards than those that were embedded",
            where="--shards",
            hint="Name the shards of EMBEDDINGS in one pattern, as fovea embed had them",
        )
    return _Page(preview, manifests)


def _finish(
    command: str,
    out: Path,
    outcome: Outcome | None,
    vectors: Vectors,
    made: dict[str, Any],
    work: Path | None,
    page: _Page | None,
    others: Sequence[Vectors] = (),
    pair_title: str = "",
) -> None:
    """Writes the selection and the page, and prints what was selected."""
    from pipeline.data.curation.outcome import write_outcome
    from pipeline.data.curation.workspace import remove

    if outcome is None:
        print(f"this part is done: {printable(str(_work(out, work)))}; run all parts twice, then the command without --part")
        return
    info = write_outcome(out, outcome, vectors, {"command": command, **made})
    for note in outcome.notes:
        print(printable(note))
    for name, count in info.counts.items():
        print(f"  {name.replace('_', ' '):<22}{count:>12}")
    print(f"{info.samples} of {info.total} samples selected, {info.weight:.0f} in an epoch: {printable(str(out))}")
    if page is not None:
        from pipeline.reports.curation import write

        write(page.out, command, info, outcome, vectors, others, manifests=page.manifests, pair_title=pair_title)
        print(f"page: {printable(str(page.out))}")
    if work is None:
        remove(_work(out, work))
