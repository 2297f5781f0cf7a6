"""Packing samples into shards: deterministic in the seed, and going on where it was killed.

After each whole shard ``<prefix>.pack.json`` says how far the work is and of which source, seed and sizes it is. The same command
keeps the shards that are finished, goes on with the next, and ends with the bytes that an undisturbed run would have written.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.data import storage
from pipeline.data.judge import judge
from pipeline.data.pack import ShardWriter
from pipeline.data.random import permutation
from pipeline.data.sources import LeftOut, Source
from pipeline.data.transcode import Form, transcode
from pipeline.errors import DataError
from pipeline.locks import lock

FORMAT = 1
_SHUFFLE = 0x9ACC  # names the draw


@dataclass(frozen=True)
class Packing:
    """How to pack.

    Attributes:
        prefix: begins the names of the shards.
        samples_per_shard: see :class:`ShardWriter`.
        bytes_per_shard: see :class:`ShardWriter`.
        seed: of the shuffling; None keeps the order of the source.
        min_side: pictures with a smaller side are left out, pixels.
        max_pixels: larger pictures are left out.
        transcode: write what the decoder does not read (GIF, AVIF…) anew in this form; None leaves it out.
        max_side: scale pictures down so that the longer side has no more pixels.
    """

    prefix: str = "train"
    samples_per_shard: int = 10_000
    bytes_per_shard: int = 400_000_000
    seed: int | None = 0
    min_side: int = 16
    max_pixels: int = 50_000_000
    transcode: Form | None = None
    max_side: int | None = None


@dataclass(frozen=True)
class Piece:
    """A finished shard.

    Attributes:
        name: of the file.
        bytes: its size.
        samples: samples in it.
        rewritten: pictures in it that were transcoded or scaled.
        following: how many samples of the source had been looked at when it was full.
        skipped: length of the list of those left out by then, bytes.
    """

    name: str
    bytes: int
    samples: int
    rewritten: int
    following: int
    skipped: int


@dataclass(frozen=True)
class PackReport:
    """What became of the samples.

    Attributes:
        shards: paths of the shards.
        packed: samples in them.
        rewritten: pictures among them that were transcoded or scaled.
        skipped: (name, reason) of each sample left out, by name.
        classes: class names, the position is the class number.
        kept: shards that an earlier attempt had finished.
    """

    shards: tuple[str, ...]
    packed: int
    rewritten: int
    skipped: tuple[tuple[str, str], ...]
    classes: tuple[str, ...]
    kept: int = 0

    @property
    def reasons(self) -> dict[str, int]:
        """How many samples were left out for each reason."""
        return dict(sorted(Counter(reason for _, reason in self.skipped).items()))


def pack(
    source: Source,
    out: str | Path,
    packing: Packing | None = None,
    *,
    overwrite: bool = False,
    threads: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
) -> PackReport:
    """Packs the samples of a source into shards, or goes on where a packing with the same arguments was stopped.

    The bytes depend on the source, the settings and (where pictures are written anew) the version of Pillow. Besides the shards
    there are ``<prefix>.pack.json``, ``classes.txt`` if the source names classes, and ``<prefix>.skipped.txt`` if samples were
    left out.

    Args:
        source: see :func:`pipeline.data.sources.open_source`.
        out: where the shards go.
        packing: how.
        overwrite: replace shards of the same prefix, whatever they are.
        threads: read and judge this many samples at a time.
        progress: called with (samples seen, samples in all, a line after each shard).

    Raises:
        DataError: nothing to pack, shards of something else are there already, or another packing is at work.
    """
    packing, out = packing or Packing(), Path(out)
    if not len(source):
        raise DataError("the source holds no pictures", hint="Point to a folder with one sub-folder a class, or to a table.")
    if not packing.prefix or "/" in packing.prefix or packing.prefix.startswith("."):
        raise DataError(f"{packing.prefix!r} cannot begin a file's name", where="prefix", hint="Use letters, digits, _ and -.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / f".{packing.prefix}.skipped.tmp").open("a+b") as journal:
            return _pack(source, out, packing, journal, overwrite, threads, progress)
    except OSError as error:
        hint = "Make room or give another directory; the same command goes on where it stopped."
        raise DataError(f"cannot be written ({error.strerror})", where=str(error.filename or out), hint=hint) from error


def _pack(
    source: Source,
    out: Path,
    packing: Packing,
    journal: IO[bytes],
    overwrite: bool,
    threads: int,
    progress: Callable[[int, int, str], None] | None,
) -> PackReport:
    try:
        lock(journal.fileno(), journal.name, wait=False)
    except BlockingIOError:
        raise DataError("another packing is at work here", where=str(out), hint="Wait for it, or stop it.") from None
    state = _State(out, packing, source)
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
        state.save(pieces)
        if progress is not None:
            progress(seen, len(source), f"{path.name}: {samples} samples, {pieces[-1].bytes / 1e6:.1f} MB")

    total = len(source)
    order = list(range(total)) if packing.seed is None else permutation(total, packing.seed, _SHUFFLE).tolist()
    writer = ShardWriter(
        out,
        packing.prefix,
        samples_per_shard=packing.samples_per_shard,
        bytes_per_shard=packing.bytes_per_shard,
        shards=[str(out / piece.name) for piece in pieces],
        samples=sum(piece.samples for piece in pieces),
        finished=finished,
    )
    if not complete:
        state.save(pieces)
        journal.truncate(last.skipped)
        with writer, ThreadPoolExecutor(threads) as pool:
            for position, (sample, reason, anew) in _ahead(pool, source, packing, order[seen:], 4 * threads):
                if sample is None:
                    journal.write(f"{reason}\t{_line(source.name(position))}\n".encode("utf-8", "surrogateescape"))
                else:
                    writer.write({"__key__": source.key(position, writer.samples), **sample})
                    rewritten += anew
                seen += 1
                if progress is not None and seen % 32 == 0:
                    progress(seen, len(source), "")
    skipped = _finish(source, out, packing.prefix, journal, complete)
    if not writer.samples:
        where = str(out / f"{packing.prefix}.skipped.txt")
        raise DataError(f"none of {len(source)} pictures can be used", where=where, hint="It names the reasons.")
    state.save(pieces, complete=True)
    (out / f".{packing.prefix}.skipped.tmp").unlink(missing_ok=True)
    return PackReport(
        shards=tuple(writer.shards),
        packed=writer.samples,
        rewritten=sum(piece.rewritten for piece in pieces),
        skipped=skipped,
        classes=source.classes,
        kept=kept,
    )


def _ahead(
    pool: ThreadPoolExecutor, source: Source, packing: Packing, positions: Sequence[int], most: int
) -> Iterator[tuple[int, tuple[dict[str, Any] | None, str, bool]]]:
    """Each position in turn with what :func:`_prepare` makes of it; the next few are under way already."""
    flying: deque[tuple[int, Future[tuple[dict[str, Any] | None, str, bool]]]] = deque()
    for position in positions:
        flying.append((position, pool.submit(_prepare, source, packing, position)))
        if len(flying) >= most:
            first, job = flying.popleft()
            yield first, job.result()
    for position, job in flying:
        yield position, job.result()


def _prepare(source: Source, packing: Packing, position: int) -> tuple[dict[str, Any] | None, str, bool]:
    """The members of a sample, or None and the reason; and whether its picture was written anew."""
    try:
        raw = source.load(position)
    except LeftOut as error:
        return None, str(error), False
    verdict = judge(raw.image, min_side=packing.min_side, max_pixels=packing.max_pixels)
    form: Form | None = None
    if verdict.status in ("unsupported", "not_image"):
        form = packing.transcode
    elif verdict.status == "ok" and packing.max_side is not None and max(verdict.width, verdict.height) > packing.max_side:
        form = "jpg" if verdict.format == "jpeg" else "png"
    image = raw.image
    if form is not None:
        image = transcode(image, form, max_pixels=packing.max_pixels, max_side=packing.max_side) or image
    if image is not raw.image:
        verdict = judge(image, min_side=packing.min_side, max_pixels=packing.max_pixels)
    if verdict.status != "ok":
        return None, verdict.status, False
    return raw.sample(image, verdict), "", image is not raw.image


def _finish(source: Source, out: Path, prefix: str, journal: IO[bytes], complete: bool) -> tuple[tuple[str, str], ...]:
    """Writes the lists beside the shards; what was left out and why."""
    path = out / f"{prefix}.skipped.txt"
    if complete:
        lines = path.read_bytes().splitlines() if path.exists() else []
    else:
        journal.flush()
        journal.seek(0)
        lines = journal.read().splitlines()
    pairs = [line.decode("utf-8", "surrogateescape").split("\t", 1) for line in lines]
    skipped = sorted((name, reason) for reason, name in pairs)
    if not complete:
        text = "".join(f"{reason}\t{name}\n" for name, reason in skipped)
        if skipped:
            storage.write_whole(path, text.encode("utf-8", "surrogateescape"))
        else:
            path.unlink(missing_ok=True)
        if source.classes:
            named = "".join(f"{name}\n" for name in source.classes)
            storage.write_whole(out / "classes.txt", named.encode("utf-8", "surrogateescape"))
    return tuple(skipped)


def _line(name: str) -> str:
    return name.replace("\n", " ").replace("\r", " ")


class _State:
    """``<prefix>.pack.json``: the settings of a packing and the shards that are finished."""

    def __init__(self, out: Path, packing: Packing, source: Source) -> None:
        self._out, self._prefix, self._classes = out, packing.prefix, source.classes
        self._path = out / f"{packing.prefix}.pack.json"
        named = "\0".join((source.digest, *source.classes)).encode("utf-8", "surrogateescape")
        self._settings: dict[str, Any] = {**asdict(packing), "source": hashlib.blake2b(named, digest_size=16).hexdigest()}
        if packing.transcode is not None or packing.max_side is not None:
            from PIL import __version__

            self._settings["pillow"] = __version__

    def load(self, overwrite: bool, journal: int) -> tuple[list[Piece], bool]:
        """The shards to keep, and whether they are all; what cannot be kept is removed.

        Args:
            overwrite: keep nothing.
            journal: length of the list of samples left out, bytes.

        Raises:
            DataError: shards of something else are there.
        """
        prefix = glob.escape(self._prefix)
        there = sorted(self._out.glob(f"{prefix}-[0-9]*.tar"))
        self._check_classes(there)
        document = self._read()
        if not overwrite and there:
            self._check(document, there)
        for torn in self._out.glob(f".{prefix}-[0-9]*.tar.*.tmp"):
            torn.unlink()
        pieces: list[Piece] = []
        complete = False
        if not overwrite and document is not None:
            for piece in (Piece(**entry) for entry in document["shards"]):
                path = self._out / piece.name
                if not path.is_file() or path.stat().st_size != piece.bytes:
                    break
                pieces.append(piece)
            complete = bool(document["complete"]) and len(pieces) == len(document["shards"])
            if not complete and pieces and journal < pieces[-1].skipped:
                pieces = []  # the list of those left out is gone, so nothing can be continued
        for path in there[len(pieces) :]:
            path.unlink()
        return pieces, complete

    def save(self, pieces: Sequence[Piece], *, complete: bool = False) -> None:
        """Writes how far the work is, whole or not at all."""
        document = {
            "format": FORMAT,
            "complete": complete,
            "settings": self._settings,
            "shards": [asdict(piece) for piece in pieces],
        }
        storage.write_whole(self._path, (json.dumps(document, indent=1) + "\n").encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            document = json.loads(self._path.read_bytes())
            [Piece(**entry) for entry in document["shards"]]
            return document if document["format"] == FORMAT and {"settings", "complete"} <= document.keys() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _check(self, document: dict[str, Any] | None, there: Sequence[Path]) -> None:
        hint = "Choose another directory or prefix, or allow overwriting (--overwrite)."
        if document is None:
            raise DataError(f"{len(there)} shards are there already", where=str(there[0]), hint=hint)
        old = document["settings"]
        changed = [name for name in {**self._settings, **old} if old.get(name) != self._settings.get(name)]
        if changed:
            told = ", ".join(
                "the source is another" if name == "source" else f"{name} was {old.get(name)} and is {self._settings.get(name)}"
                for name in changed
            )
            what = f"{len(there)} shards are there already, of another packing ({told})"
            raise DataError(what, where=str(there[0]), hint=f"With the same settings it goes on where it stopped. {hint}")

    def _check_classes(self, own: Sequence[Path]) -> None:
        """Shards of two prefixes in one folder share the class numbers, or labels would not mean the same."""
        path = self._out / "classes.txt"
        if not self._classes or not path.is_file() or set(self._out.glob("*.tar")) <= set(own):
            return
        old = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        if old != list(self._classes):
            odd = sorted(set(old) ^ set(self._classes))
            raise DataError(
                f"names other classes than this source ({len(old)} and {len(self._classes)}"
                + (f"; only one of them has {odd[0]!r})" if odd else ")"),
                where=str(path),
                hint="The same number would mean another class. Give both sources the same sub-folders, or another OUT.",
            )
