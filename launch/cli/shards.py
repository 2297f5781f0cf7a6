"""``fovea shards``: indexes, verifies, packs and inspects WebDataset shards. Each subcommand imports lazily."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli import shards_bucket, shards_curate
from launch.cli.channels import ChannelsOption, channels_of, measured, write_text
from launch.cli.choices import ImageFormat, Labels, OnTruncated, SourceLayout, local_only
from launch.cli.shards_index import NAMED, build_index, class_names, part_of, store_at_start
from launch.cli.shards_synthesize import synthesize
from pipeline.errors import ConfigError
from pipeline.masking import printable, shown

if TYPE_CHECKING:
    from pipeline.data.pack.samples import Source
    from pipeline.data.settings import DataSettings

app = typer.Typer(no_args_is_help=True, help="Pack, index, verify and inspect WebDataset shards.")

ConfigArgument = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a config that comes with fovea: dinov2/cifar10_vit_tiny."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings to override, by dotted key: schedule.lr.peak=1e-3 evaluation.knn.k='[10, 20]'."
    ),
]
Patterns = Annotated[list[str], typer.Argument(metavar="SHARDS...", help="Paths or URLs, with {000..123} or *.")]
IndexOption = Annotated[
    Path | None, typer.Option("--index", help="Directory of the index; by default in your cache, where training looks for it.")
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Number of processes; by default one per core.")]
ImageOption = Annotated[str | None, typer.Option(help="File extensions of images, comma-separated.")]
CaptionOption = Annotated[str | None, typer.Option(help="File extension of captions.")]
LabelOption = Annotated[str | None, typer.Option(help="File extension of class numbers.")]


SelectionOption = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="Use only the samples of this selection; may be repeated.")
]
PartOption = Annotated[
    str | None, typer.Option(help="Do only one part of the shards, such as 3/16; the same command without it joins all parts.")
]
OnTruncatedOption = Annotated[
    OnTruncated, typer.Option(help="How to handle a truncated tar: raise an error, or keep the samples before the cut.")
]


@app.command("index")
def index(
    patterns: Patterns,
    directory: IndexOption = None,
    workers: WorkersOption = None,
    image: ImageOption = None,
    caption: CaptionOption = None,
    label: LabelOption = None,
    on_truncated_shard: OnTruncatedOption = OnTruncated.ERROR,
    channels: ChannelsOption = None,
    report: Annotated[
        Path | None, typer.Option(help="Report file of all problems, as JSON and .txt; by default report.json in the index.")
    ] = None,
    part: PartOption = None,
    check: Annotated[bool, typer.Option("--check", help="Read the existing index too, and replace what is damaged.")] = False,
) -> None:
    """Read every shard once and record its samples, which of them can be used, and why the others cannot.

    Training does this automatically; for large data, run it ahead of time, on several machines with --part. The index of a shard
    is reused until the shard changes, also in other data sets, and an interrupted command continues. Problems are listed in
    report.txt, and in report.json for programs.

    [b]Examples[/b]

    fovea shards index '/data/train-{000..099}.tar'

    fovea shards index /data/web --on-truncated-shard keep-readable --report broken.json

    sbatch --array 1-16 --wrap 'fovea shards index s3://web/ --part $SLURM_ARRAY_TASK_ID/16'
    """
    settings = _settings(patterns, directory, image, caption, label, on_truncated_shard, channels)
    manifest, folder = build_index(settings, workers, report, check=check, part=part_of(part))
    classes = f", {manifest.classes} classes" if manifest.classes else ", no class numbers"
    print(f"{manifest.total} samples in {len(manifest.shards)} shards{classes}; index in {folder}")
    print(f"fingerprint {manifest.fingerprint}")


@app.command("verify")
def verify(
    patterns: Patterns,
    directory: IndexOption = None,
    workers: WorkersOption = None,
    image: ImageOption = None,
    caption: CaptionOption = None,
    label: LabelOption = None,
    on_truncated_shard: OnTruncatedOption = OnTruncated.ERROR,
    channels: ChannelsOption = None,
    exclude: Annotated[
        bool,
        typer.Option(
            "--exclude", help="Mark failing samples in the index so that no training uses them; the shards are not changed."
        ),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write every failure to this JSON file.")] = None,
    part: PartOption = None,
) -> None:
    """Decode every accepted sample, and compare its checksum and size with the index. Exit code 1 if any fails.

    If interrupted, the same command continues. Several machines with a common --index can share the work with --part.
    --exclude changes the index and its fingerprint: a run that was trained on the unchanged data will not resume on it.

    [b]Examples[/b]

    fovea shards verify '/data/train-{000..099}.tar'

    fovea shards verify '/data/train-{000..099}.tar' --exclude

    sbatch --array 1-16 --wrap 'fovea shards verify s3://web/ --index /shared/index --part $SLURM_ARRAY_TASK_ID/16'
    """
    if part is not None and exclude:
        raise ConfigError("a part alone is not excluded", where="--exclude", hint="Run it without --part when all are verified")
    from launch.progress import progress_bar
    from pipeline.data.inspect import verify as verification

    settings = _settings(patterns, directory, image, caption, label, on_truncated_shard, channels)
    manifest, folder = build_index(settings, workers, None)
    with progress_bar("decoding") as progress:
        verified = verification.verify(manifest, workers=workers, progress=progress, store=store_at_start(), part=part_of(part))
    rows = [
        {"reason": f.reason, "shard": manifest.shards[f.shard].url, "key": manifest.rows(f.shard).keys[f.row]}
        for f in verified.failures
    ]
    if report is not None:
        _write_json(report, {"checked": verified.checked, "reasons": verified.reasons, "failures": rows})
    again = f" ({verified.resumed} of them by an earlier, stopped verification)" if verified.resumed else ""
    print(f"decoded {verified.checked} samples in {len(manifest.shards)} shards{again}")
    if not rows:
        print("every one is as the index says")
        return
    for reason, number in verified.reasons.items():
        print(f"\n{number} {reason}: {verification.REASONS[reason]}")
        named = [entry for entry in rows if entry["reason"] == reason]
        for entry in named[:NAMED]:
            print(f"  {printable(entry['shard'])}  {_shown(entry['key'])}")
        if len(named) > NAMED:
            print(f"  and {len(named) - NAMED} more" + ("" if report else "; --report FILE writes them all"))
    if exclude:
        changed = verification.exclude(manifest, verified.failures)
        print(f"\nexcluded {len(rows)} samples, {changed.total} are left; index in {folder}")
        print(f"the fingerprint was {manifest.fingerprint} and is {changed.fingerprint}: to a run these are other data")
    raise typer.Exit(1)


@app.command("pack")
def pack(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, a table, or shards; see above.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output directory of the shards, or a folder in a bucket.")],
    prefix: Annotated[str, typer.Option(help="Prefix of the shards' names.")] = "train",
    size: Annotated[int, typer.Option(min=1, help="Maximum size of a shard, MB; 200 to 500 are suitable for training.")] = 400,
    samples: Annotated[int, typer.Option(min=1, help="Maximum number of samples per shard.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffled order.")] = 0,
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="Shuffle, or keep the order of the source.")] = True,
    min_side: Annotated[int, typer.Option(min=1, help="Skip images with a shorter side below this, pixels.")] = 16,
    max_pixels: Annotated[int, typer.Option(min=1, help="Skip images with more pixels.")] = 50_000_000,
    max_side: Annotated[int | None, typer.Option(min=16, help="Downscale images to this longer side, pixels.")] = None,
    transcode: Annotated[
        ImageFormat | None, typer.Option(help="Re-encode GIF, AVIF… in this format (first frame), instead of skipping them.")
    ] = None,
    layout: Annotated[
        SourceLayout, typer.Option(help="Layout of SOURCE; flat is a folder without classes, files is img2dataset's output.")
    ] = SourceLayout.AUTO,
    on_truncated_shard: OnTruncatedOption = OnTruncated.ERROR,
    channels: ChannelsOption = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Samples read in parallel.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite shards of the same prefix.")] = False,
    follow_links: Annotated[
        bool | None,
        typer.Option(
            "--follow-links/--no-follow-links",
            help="Follow links that leave SOURCE, or skip them. By default they are skipped, and the loss of an entire class or "
            "shard is an error.",
        ),
    ] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="Folder that paths of a table may point to, besides its own; may be repeated.")
    ] = None,
    labels: Annotated[Labels, typer.Option(help="names reads numbers as class names.")] = Labels.AUTO,
    classes: Annotated[
        Path | None, typer.Option(help="A classes.txt with the class names, one per line, in the order of their numbers.")
    ] = None,
    max_file_mb: Annotated[int, typer.Option("--max-file-mb", min=1, help="Skip larger files and members, MB.")] = 1024,
    staging: Annotated[
        Path | None,
        typer.Option(
            help="Directory of up to three shards on their way to a bucket; by default in your cache.",
            callback=local_only,
        ),
    ] = None,
    outage_timeout: shards_bucket.OutageOption = 60.0,
    selection: SelectionOption = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="Pack only one part of SOURCE, such as 3/16; its shards begin with PREFIX_00003of00016. "
            "Keys that shards of two parts have in common are not numbered."
        ),
    ] = None,
) -> None:
    """Write shuffled WebDataset shards. If interrupted, the same command continues and produces identical bytes.

    SOURCE is one of

    - a folder of images: its sub-folders are the classes, KEY.txt beside KEY.jpg is its caption;

    - a table (.csv, .tsv, .jsonl, .parquet) with the column path and optionally label and caption;

    - the output of img2dataset, tars or files;

    - other shards, to shuffle them again, change the shard size or skip small images; all members are kept.

    With --channels, TIFF, PNG, NumPy and DICOM files are packed as they are; where several files make an image, they share a
    name up to the first dot.

    With --part, several machines share the work: of shards each reads its own and shuffles within them, so that memory grows
    with a part; of other sources each lists all.

    An ambiguous SOURCE is refused. Skipped samples are counted, and listed in OUT/PREFIX.skipped.txt. To a bucket, each shard is
    sent while the next is packed, and compared by size and checksum; see also fovea shards push.

    [b]Examples[/b]

    fovea shards pack photos/ shards/

    fovea shards pack photos/ s3://bucket/photos

    fovea shards pack table.parquet shards/ --prefix val --size 200

    fovea shards pack 'old/{00000..00999}.tar' shards/ --min-side 224 --transcode png

    fovea shards pack 'old/{00000..00999}.tar' unique/ --selection unique.parquet

    fovea shards pack microscope/ shards/ --channels 8xuint16

    sbatch --array 1-16 --wrap 'fovea shards pack "old/*.tar" s3://bucket/new --part $SLURM_ARRAY_TASK_ID/16'
    """
    from launch.progress import progress_bar
    from pipeline.data.formats.channels import required
    from pipeline.data.pack.packer import Packing
    from pipeline.data.pack.packer import pack as write
    from pipeline.data.pack.sources import Options, open_source

    _check_out(source, out)
    own = part_of(part)
    if own is not None:
        prefix = f"{prefix}_{own[0]:05d}of{own[1]:05d}"
    options = Options(
        use_damaged=on_truncated_shard is OnTruncated.KEEP_READABLE,
        follow_links=follow_links,
        roots=tuple(root or ()),
        labels=labels.value,
        classes=class_names(classes),
        max_file=max_file_mb << 20,
        channels=required(channels_of(channels)),
        part=own,
    )
    packing = Packing(
        prefix=prefix,
        samples_per_shard=samples,
        bytes_per_shard=size * 1_000_000,
        seed=seed if shuffle else None,
        min_side=min_side,
        max_pixels=max_pixels,
        transcode=transcode.value if transcode else None,
        max_side=max_side,
        channels=options.channels,
    )
    with (
        shards_bucket.delivery(out, prefix, staging, overwrite, outage_timeout) as (folder, target),
        progress_bar("packing") as progress,
    ):
        listing = open_source(source, layout=layout.value, store=store_at_start(), options=options)
        if selection:
            listing = _selected_source(listing, source, selection, on_truncated_shard)
        report = write(listing, folder, packing, overwrite=overwrite, threads=threads, progress=progress, delivery=target)
    print(report.text(out, prefix))
    if target is not None:
        print(target.transfer.text())
    print(f"shards: {printable(_range(report.shards))}")


app.command("push")(shards_bucket.push)
app.command("pull")(shards_bucket.pull)
shards_curate.add(app)


app.command("synthesize")(synthesize)


@app.command("stats")
def stats(
    patterns: Patterns,
    directory: IndexOption = None,
    workers: WorkersOption = None,
    image: ImageOption = None,
    caption: CaptionOption = None,
    label: LabelOption = None,
    on_truncated_shard: OnTruncatedOption = OnTruncated.ERROR,
    channels: ChannelsOption = None,
    images: Annotated[int, typer.Option(min=1, help="With --channels: number of images whose values are measured.")] = 2000,
    write: Annotated[
        Path | None,
        typer.Option(help="With --channels: write a config snippet with the normalization.", callback=local_only),
    ] = None,
    global_batch: Annotated[int, typer.Option(min=1, help="Global batch size for the recommendations.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    selection: SelectionOption = None,
) -> None:
    """Show statistics of shards: sizes, formats, classes, captions, duplicate images, and what would slow down training.

    Everything comes from the index, which is created if necessary; images are not read again. With --channels, the values of
    images are measured too: range, percentiles, mean and deviation of each channel.

    [b]Examples[/b]

    fovea shards stats '/data/train-{000..099}.tar'

    fovea shards stats '/data/train-{000..099}.tar' --json > stats.json

    fovea shards stats '/data/cells-*.tar' --channels 8xuint16 --write channels.yaml
    """
    from pipeline.data.inspect.stats import statistics

    if write is not None and channels is None:
        raise ConfigError("needs --channels", where="--write", hint="Give their number and type, such as 8xuint16")
    settings = _settings(patterns, directory, image, caption, label, on_truncated_shard, channels)
    manifest, _ = build_index(settings, workers, None, quiet=as_json)
    if selection:
        from pipeline.data.selections.apply import Chosen, select

        manifest = select(manifest, [Chosen(0, len(manifest.shards), tuple(selection), "--selection")])
    computed = statistics(manifest, global_batch=global_batch)
    values = measured(manifest, settings, images) if settings.channels is not None else None
    if as_json:
        print(json.dumps({**computed.document(), **({"values": values.document()} if values is not None else {})}, indent=1))
    else:
        print(computed.text() + (f"\n\n{shown(values.text())}" if values is not None else ""))
    if write is not None and values is not None:
        write_text(write, values.snippet(printable(f"fovea shards stats {' '.join(patterns)} --channels {channels}", limit=300)))
        print(f"wrote {write}: the section data.channels of a config", file=sys.stderr if as_json else sys.stdout)


def _selected_source(listing: Source, source: str, selection: list[Path], on_truncated: OnTruncated) -> Source:
    """The samples of shards that selections have."""
    from pipeline.data.pack.members import Members
    from pipeline.data.selections.packed import selected_members

    if not isinstance(listing, Members) or any(part.offset < 0 for parts in listing.parts[:1] for part in parts.values()):
        raise ConfigError("applies to shards only", where="--selection", hint="Leave it out, or give shards as SOURCE")
    manifest, _ = build_index(_settings([source], None, None, None, None, on_truncated), None, None, quiet=True)
    return selected_members(listing, manifest, selection)


@app.command("preview")
def preview(
    config: ConfigArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Output file: .html for a page, .png for an image.", callback=local_only)
    ] = Path("preview.html"),
    samples: Annotated[int, typer.Option(min=1, max=512, help="Number of samples.")] = 8,
    channels: ChannelsOption = None,
) -> None:
    """Draw the exact crops that training would see, as an HTML page or a contact sheet.

    With shards instead of a CONFIG, it draws the images without augmentation.

    [b]Examples[/b]

    fovea shards preview dinov2/cifar10_vit_tiny data.shards='/data/train-{000..099}.tar' -o preview.html

    fovea shards preview my.yaml -o sheet.png --samples 16

    fovea shards preview '/data/train-{000..099}.tar' -o raw.png
    """
    if _names_shards(config):
        from pipeline.data.augment.views import channel_spec
        from pipeline.reports.contact_sheet import write as write_raw

        named = _settings([config, *(overrides or ())], None, None, None, None, OnTruncated.ERROR, channels)
        manifest, _ = build_index(named, None, None)
        declared = channel_spec(named.channels)
        write_raw(manifest, out, samples, shown=declared.composite if declared is not None else None)
    else:
        from pipeline.config.load import load
        from pipeline.reports.preview import write

        write(load(config, overrides or ()), out, samples)
    print(f"wrote {out}")


@app.command("ls")
def ls(
    config: ConfigArgument,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(min=0, help="Show the samples of this step.")] = None,
    key: Annotated[str | None, typer.Option(help="Show the steps that contain this sample; shard.tar/key for one shard.")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="Range to search for --key, in epochs.")] = 1.0,
    until: Annotated[int | None, typer.Option(min=0, help="End of the range of steps (exclusive), instead of --epochs.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Show which of this many ranks reads each sample.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the samples of a step, or the steps that contain a sample.

    [b]Examples[/b]

    fovea shards ls my.yaml --step 1234

    fovea shards ls my.yaml --key 000042 --epochs 10
    """
    from launch.cli.shards_ls import run
    from pipeline.config.load import load

    run(load(config, overrides or ()), step=step, key=key, epochs=epochs, until=until, ranks=ranks, as_json=as_json)


# ---- shared by the subcommands -------------------------------------------------------------------------------------------


def _settings(
    patterns: Sequence[str],
    directory: Path | None,
    image: str | None,
    caption: str | None,
    label: str | None,
    on_truncated: OnTruncated,
    channels: str | None = None,
) -> DataSettings:
    from pydantic import ValidationError

    from pipeline.data.settings import DataSettings

    chosen = {
        "index": directory,
        "image_extensions": image.split(",") if image else None,
        "caption_extension": caption,
        "label_extension": label,
        "channels": channels_of(channels),
    }
    options = {key: value for key, value in chosen.items() if value is not None}
    try:
        return DataSettings.model_validate({"shards": list(patterns), "on_truncated_shard": on_truncated.value, **options})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:1]) or "shards"
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{str(first['input'])[:200]!r} {what}", where=key, hint="Name a folder, or a pattern with *") from None


def _check_out(source: str, out: str) -> None:
    """Refuse an output directory that would become part of the source."""
    folder = Path(source)
    if folder.is_dir() and "://" not in out and Path(out).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"is inside the source {source}", where=out, hint="Choose an OUT outside the source")


def _names_shards(word: str) -> bool:
    path = Path(word)
    return word.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar")))


def _range(shards: Sequence[str]) -> str:
    """Numbered shards as one pattern, for use in another command."""
    if len(shards) < 2:
        return "".join(shards)
    (stem, first), (_, last) = (shard.removesuffix(".tar").rsplit("-", 1) for shard in (shards[0], shards[-1]))
    return f"'{stem}-{{{first}..{last}}}.tar'"


def _shown(key: str) -> str:
    return printable(key)


def _write_json(path: Path, document: dict[str, object]) -> None:
    from pipeline.data.storage import write_atomically
    from pipeline.errors import DataError

    try:
        write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", where=str(path), hint="Choose another --report") from error
