"""Packs samples into shards, deterministically in the seed; resumes after an interruption.

After each complete shard, its entry is recorded beside ``<prefix>.pack.json``, which has source, seed and sizes. The same command
keeps the finished shards, continues with the next, and produces the same bytes as an uninterrupted run.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from pipeline.data.formats.channels import Channels
from pipeline.data.formats.read import check_libraries, inspect, inspect_stack
from pipeline.data.index.image_header import HeaderInfo, inspect_header
from pipeline.data.order.random import permutation
from pipeline.data.pack.account import NOTES, REASONS, WITH_IMAGE, Account, left_out_line, note_line, settle, write_lists
from pipeline.data.pack.delivery import Delivery
from pipeline.data.pack.layouts import extension_counts
from pipeline.data.pack.resume import PackState, Piece
from pipeline.data.pack.samples import Raw, SkippedSample, Source
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.data.pack.sources import ImageSource
from pipeline.data.pack.transcode import Form, transcode
from pipeline.errors import ConfigError, DataError
from pipeline.runtime.locks import lock
from pipeline.untrusted import printable

_SHUFFLE = 0x9ACC  # identifies the random draw
_Prepared = tuple[dict[str, Any] | None, tuple[str, ...], bool]


@dataclass(frozen=True)
class Packing:
    """Settings of a packing.

    Attributes:
        prefix: prefix of the shards' names.
        samples_per_shard: see :class:`ShardWriter`.
        bytes_per_shard: see :class:`ShardWriter`.
        seed: seed of the shuffle; None keeps the order of the source.
        min_side: images with a smaller side are left out, pixels.
        max_pixels: larger images are left out.
        transcode: format to which unsupported ones (GIF, AVIF…) are transcoded; None leaves them out.
        max_side: downscale images so that the longer side has at most this many pixels.
        channels: what images of other than 8-bit RGB must have; they are packed as they are.
    """

    prefix: str = "train"
    samples_per_shard: int = 10_000
    bytes_per_shard: int = 400_000_000
    seed: int | None = 0
    min_side: int = 16
    max_pixels: int = 50_000_000
    transcode: Form | None = None
    max_side: int | None = None
    channels: Channels | None = None


@dataclass(frozen=True)
class PackReport:
    """Result of a packing.

    Attributes:
        shards: paths of the shards.
        packed: samples in them.
        rewritten: images among them that were transcoded or downscaled.
        skipped: (name, reason) of each file, row or member left out, by name.
        classes: class names; the position is the class index.
        kept: shards that an earlier attempt had finished.
        account: totals over every file, row or member seen.
        notes: (name, note) of each sample that is packed with something replaced or missing, by name.
        remarks: remarks on the source as a whole.
    """

    shards: tuple[str, ...]
    packed: int
    rewritten: int
    skipped: tuple[tuple[str, str], ...]
    classes: tuple[str, ...]
    kept: int = 0
    account: Account = field(default_factory=Account)
    notes: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def reasons(self) -> dict[str, int]:
        """Returns the number of files, rows or members left out by reason."""
        return dict(sorted(Counter(reason for _, reason in self.skipped).items()))

    def text(self, out: Path | str, prefix: str) -> str:
        """Formats the result: what was packed, what was left out and why, in counts that add up.

        Args:
            out: directory or URL of the shards and lists.
            prefix: of their names.
        """
        out = str(out).rstrip("/")
        classes = f", {len(self.classes)} classes" if self.classes else ""
        kept = f" ({self.kept} of them were there already)" if self.kept else ""
        lines = [f"packed {self.packed} samples in {len(self.shards)} shards{kept}{classes}"]
        if self.rewritten:
            lines.append(f"wrote {self.rewritten} images again")
        for reason, number in self.account.left_out.items():
            meaning = REASONS.get(reason, "")
            if reason == "not_an_image":
                names = (name for name, why in self.skipped if why == reason)
                meaning = extension_counts(Counter(Path(name).suffix[1:].lower() for name in names))
            lines.append(f"left out {number}: {reason}" + (f" ({meaning})" if meaning else ""))
        if self.account.left_out:
            lines.append(f"which ones: {out}/{prefix}.skipped.txt")
        for note, number in self.account.noted.items():
            lines.append(f"packed, but {number}: {note}" + (f" ({NOTES[note]})" if note in NOTES else ""))
        if self.account.noted:
            lines.append(f"which ones: {out}/{prefix}.notes.txt")
        lines += [f"note: {remark}" for remark in self.remarks]
        lines.append(f"account: {self.account.text()}")
        return "\n".join(printable(line) for line in lines)


def pack(
    source: Source,
    out: str | Path,
    packing: Packing | None = None,
    *,
    overwrite: bool = False,
    threads: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
    delivery: Delivery | None = None,
) -> PackReport:
    """Packs the samples of a source into shards, or resumes an interrupted packing with the same arguments.

    The bytes depend on the source, the settings and (where images are transcoded) the version of Pillow. Besides the shards, it
    writes ``<prefix>.pack.json``, which finally contains the account, ``classes.txt`` if the source names classes,
    ``<prefix>.skipped.txt`` if anything was left out, and ``<prefix>.notes.txt`` if samples are packed with something replaced or
    missing.

    Args:
        source: see :func:`pipeline.data.pack.sources.open_source`.
        out: directory of the shards.
        packing: the settings.
        overwrite: replace existing shards of the same prefix.
        threads: number of samples read and validated concurrently.
        progress: called with (samples seen, total samples, a line after each shard).
        delivery: the bucket to which finished shards are moved, in which case ``out`` is its staging directory.

    Raises:
        ConfigError: channels are declared, and a library for them is not installed or an option does not apply.
        DataError: nothing to pack, shards of another packing exist, or another packing is running.
        StorageUnavailable: the bucket did not answer within ``outage_timeout``.
    """
    packing, out = packing or Packing(), Path(out)
    if packing.channels is not None:
        check_libraries()
        if packing.transcode is not None or packing.max_side is not None:
            raise ConfigError(
                "images of declared channels are packed as they are",
                where="--transcode, --max-side",
                hint="Leave the option out, or resize the images beforehand",
            )
    if not len(source):
        raise _nothing_to_pack(source)
    if not packing.prefix or "/" in packing.prefix or packing.prefix.startswith("."):
        raise DataError(f"{packing.prefix!r} cannot begin a file's name", where="prefix", hint="Use letters, digits, _ and -")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / f".{packing.prefix}.skipped.tmp").open("a+b") as journal:
            return _pack(source, out, packing, journal, overwrite, threads, progress, delivery)
    except OSError as error:
        hint = "Free space or give another directory; the same command continues where it stopped"
        raise DataError(f"cannot be written ({error.strerror})", where=str(error.filename or out), hint=hint) from error


def _pack(
    source: Source,
    out: Path,
    packing: Packing,
    journal: IO[bytes],
    overwrite: bool,
    threads: int,
    progress: Callable[[int, int, str], None] | None,
    delivery: Delivery | None,
) -> PackReport:
    try:
        lock(journal.fileno(), journal.name, wait=False)
    except BlockingIOError:
        raise DataError(
            "another `fovea shards pack` is running here", where=str(out), hint="Wait until it ends, or stop it"
        ) from None
    settings = asdict(packing)
    if packing.channels is None:
        del settings["channels"]  # as before there were any, so that such a packing resumes
    if packing.transcode is not None or packing.max_side is not None:
        from PIL import __version__

        settings["pillow"] = __version__
    state = PackState(out, packing.prefix, settings, source, delivery)
    pieces, complete = state.load(overwrite, os.fstat(journal.fileno()).st_size)
    kept = len(pieces)
    last = pieces[-1] if pieces else Piece("", 0, 0, 0, 0, 0)
    seen, rewritten = last.following, 0

    def finished(path: Path) -> None:
        nonlocal rewritten
        journal.flush()
        samples = writer.samples - sum(piece.samples for piece in pieces)
        pieces.append(Piece(path.name, path.stat().st_size, samples, rewritten, seen, journal.tell()))
        rewritten = 0
        state.add(pieces)
        if progress is not None:
            progress(seen, len(source), f"{path.name}: {samples} samples, {pieces[-1].bytes / 1e6:.1f} MB")
        if delivery is not None:
            delivery.offer(path)

    total = len(source)
    order = range(total) if packing.seed is None else permutation(total, packing.seed, _SHUFFLE)
    writer = ShardWriter(
        out,
        packing.prefix,
        samples_per_shard=packing.samples_per_shard,
        bytes_per_shard=packing.bytes_per_shard,
        shards=[str(out / piece.name) for piece in pieces],
        samples=sum(piece.samples for piece in pieces),
        finished=finished,
    )
    for path in (out / piece.name for piece in pieces):
        if delivery is not None and path.is_file():
            delivery.offer(path)  # an earlier attempt was killed before it was sent
    if not complete:
        state.save(pieces)
        journal.truncate(last.skipped)
        with writer, ThreadPoolExecutor(threads) as pool:
            for position, (sample, reasons, anew) in _ahead(pool, source, packing, order[seen:], 4 * threads):
                name = source.name(position)
                if sample is None:
                    journal.write(left_out_line(reasons[0], name))
                    journal.writelines(left_out_line(WITH_IMAGE, companion) for companion in source.companions(position))
                else:
                    writer.write({"__key__": source.key(position, writer.samples), **sample})
                    journal.writelines(note_line(note, name) for note in reasons)
                    rewritten += anew
                seen += 1
                if progress is not None and seen % 32 == 0:
                    progress(seen, len(source), "")
    skipped, notes = write_lists(source, out, packing.prefix, journal, complete)
    if not writer.samples:
        raise _nothing_packed(out / f"{packing.prefix}.skipped.txt", source, skipped)
    account = state.account if complete and state.account is not None else settle(source, writer.samples, skipped, notes)
    state.save(pieces, account)
    (out / f".{packing.prefix}.skipped.tmp").unlink(missing_ok=True)
    if delivery is not None:
        delivery.finish(piece.name for piece in pieces)
    return PackReport(
        shards=tuple(writer.shards if delivery is None else (f"{delivery.target}{piece.name}" for piece in pieces)),
        packed=writer.samples,
        rewritten=sum(piece.rewritten for piece in pieces),
        skipped=skipped,
        classes=source.classes,
        kept=kept,
        account=account,
        notes=notes,
        remarks=(*source.remarks, *_empty_classes(source, skipped)),
    )


def _empty_classes(source: Source, skipped: Sequence[tuple[str, str]]) -> list[str]:
    """Reports class indices that occur in the source but in no packed sample."""
    if not source.classes or not isinstance(source, ImageSource):
        return []
    gone = {name for name, _ in skipped}
    labels = {entry.label for entry in source.entries if printable(entry.shown) not in gone}
    empty = [name for number, name in enumerate(source.classes) if number not in labels]
    few = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
    return [f"{len(empty)} of {len(source.classes)} classes have no sample: {few}"] if empty else []


def _nothing_to_pack(source: Source) -> DataError:
    counts = Counter(reason for _, reason in source.left_out)
    counted = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
    hint = "Point to a folder with one sub-folder per class, or to a table"
    if counts.get("outside_link"):
        hint = "Add --follow-links to follow links that leave the source, if you trust them"
    return DataError(f"the source contains no images{f' ({counted} left out)' if counted else ''}", hint=hint)


def _nothing_packed(path: Path, source: Source, skipped: Sequence[tuple[str, str]]) -> DataError:
    counts = Counter(reason for _, reason in skipped)
    counted = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
    hint = "See this file for all of them"
    if counts.get("outside_link"):
        hint += "; add --follow-links to follow links that leave the source"
    missing = [name for name, reason in skipped if reason == "missing_file"]
    if any("\\" in name for name in missing):
        hint += "; Windows paths must be written with forward slashes"
    elif missing:
        hint += "; relative paths start at the table's folder, or at one that --root names"
    return DataError(f"none of {len(source)} images can be used: {counted}", where=str(path), hint=hint)


def _ahead(
    pool: ThreadPoolExecutor, source: Source, packing: Packing, positions: Iterable[int], most: int
) -> Iterator[tuple[int, _Prepared]]:
    """Yields each position with the result of :func:`_prepare`; the next few are computed in advance."""
    flying: deque[tuple[int, Future[_Prepared]]] = deque()
    for position in map(int, positions):
        flying.append((position, pool.submit(_prepare, source, packing, position)))
        if len(flying) >= most:
            first, job = flying.popleft()
            yield first, job.result()
    for position, job in flying:
        yield position, job.result()


def _inspected(raw: Raw, channels: Channels, packing: Packing) -> HeaderInfo:
    limits = {"min_side": packing.min_side, "max_pixels": packing.max_pixels}
    if channels.members:
        about = inspect_stack({raw.extension: raw.image, **raw.members}, channels, **limits)
    else:
        about = inspect(raw.image, channels, **limits)
    return HeaderInfo(about.status, about.kind, about.width, about.height)


def _prepare(source: Source, packing: Packing, position: int) -> _Prepared:
    """Returns the members of a sample and its notes, or None and the reason; and whether its image was transcoded."""
    try:
        raw = source.load(position)
    except SkippedSample as error:
        return None, (str(error),), False
    if packing.channels is not None:
        header = _inspected(raw, packing.channels, packing)
        return (raw.sample(raw.image, header), raw.notes, False) if header.status == "ok" else (None, (header.status,), False)
    header = inspect_header(raw.image, min_side=packing.min_side, max_pixels=packing.max_pixels)
    form: Form | None = None
    if header.status in ("unsupported", "not_image"):
        form = packing.transcode
    elif header.status == "ok" and packing.max_side is not None and max(header.width, header.height) > packing.max_side:
        form = "jpg" if header.format == "jpeg" else "png"
    image = raw.image
    if form is not None:
        image = transcode(image, form, max_pixels=packing.max_pixels, max_side=packing.max_side) or image
    if image is not raw.image:
        header = inspect_header(image, min_side=packing.min_side, max_pixels=packing.max_pixels)
    if header.status != "ok":
        return None, (header.status,), False
    return raw.sample(image, header), raw.notes, image is not raw.image
