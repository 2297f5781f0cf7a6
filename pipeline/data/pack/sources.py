"""Opens packing sources: a directory of images, a table of their paths, the output of img2dataset, or other shards.

Each source lists its samples in a fixed order and returns any of them by position. Its digest changes with the listing, so an
interrupted packing resumes with the same samples or not at all. What a listing leaves out is recorded with the reason.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data import storage
from pipeline.data.formats.channels import Channels
from pipeline.data.formats.read import sniff
from pipeline.data.index.captions import REPLACED, decode_text
from pipeline.data.index.image_header import inspect_header
from pipeline.data.index.labels import LabelMode, maybe_none, number_labels
from pipeline.data.pack import tables
from pipeline.data.pack.layouts import LAYOUTS, Layout, recognize
from pipeline.data.pack.listing import BROKEN, LINK, File, Listing, list_files, litter_reason, lost_by_links
from pipeline.data.pack.members import Members, digest_of, files_of, tars_of
from pipeline.data.pack.parts import SourcePart
from pipeline.data.pack.samples import (
    IMAGES,
    MAX_FILE,
    READ,
    SCIENTIFIC,
    Raw,
    SkippedSample,
    Source,
    is_below,
    read_file,
    real_folder,
)
from pipeline.errors import ConfigError, DataError
from pipeline.untrusted import printable

__all__ = [
    "LAYOUTS",
    "ImageSource",
    "Layout",
    "Members",
    "Options",
    "Raw",
    "SkippedSample",
    "Source",
    "SourceImage",
    "open_source",
]
_PROBED = frozenset(READ)
_CAPTION = "txt"
_MAX_CAPTION = 4 << 20  # bytes


@dataclass(frozen=True)
class Options:
    """How a source is listed and read.

    Attributes:
        use_damaged: use the complete samples of truncated tars.
        follow_links: follow links that leave the source. None: do not, and reject a source that would lose a whole class or
            shard;
            False: do not, and count them.
        roots: directories that the paths of a table may lead to, besides the table's own; relative paths are looked up in them
            first.
        labels: ``names`` treats numbers as class names.
        classes: class names whose positions are the class indices; empty: those of the source, sorted.
        max_file: maximum size of a file or member, bytes.
        channels: what images of other than 8-bit RGB must have.
        part: number, from 1, and count of parts: of shards every ``count``-th is listed, of other sources every sample, of which
            every ``count``-th is packed.
    """

    use_damaged: bool = False
    follow_links: bool | None = None
    roots: tuple[Path, ...] = ()
    labels: LabelMode = "auto"
    classes: tuple[str, ...] = ()
    max_file: int = MAX_FILE
    channels: Channels | None = None
    part: tuple[int, int] | None = None

    @property
    def images(self) -> tuple[str, ...]:
        """Extensions of images; of the files that make one, if there are several."""
        return IMAGES if self.channels is None else self.channels.members or SCIENTIFIC

    @property
    def stacked(self) -> bool:
        """Whether several files make an image."""
        return self.channels is not None and bool(self.channels.members)


def open_source(
    source: str | Path,
    *,
    layout: Layout = "auto",
    use_damaged: bool = False,
    store: storage.Storage | None = None,
    options: Options | None = None,
) -> Source:
    """Detects the layout of a source and lists its samples.

    Args:
        source: a directory, a table, or shards by path or pattern.
        layout: ``folder``: images, top-level directories are classes. ``flat``: images without classes. ``table``: see
            :func:`pipeline.data.pack.tables.rows`. ``files``: ``00000/000000000.jpg`` with ``.txt`` and ``.json`` beside it, as
            img2dataset writes. ``shards``: tars. ``auto``: detected, if unambiguous.
        use_damaged: use the complete samples of truncated tars; also in ``options``.
        store: access to shards.
        options: links, labels and limits.

    Raises:
        DataError: the source has none of these layouts, more than one of them, is empty, or is incomplete.
        ConfigError: an option does not fit the layout.
    """
    options = options or Options(use_damaged=use_damaged)
    listed = _opened(source, layout, options.use_damaged or use_damaged, store or storage.Storage(), options)
    if options.part is None or (isinstance(listed, Members) and listed.unit == "members"):  # its shards are those of the part
        return listed
    return SourcePart(listed, *options.part)


def _opened(
    source: str | Path, layout: Layout, use_damaged: bool, store: storage.Storage, options: Options
) -> ImageSource | Members:
    """All samples of a source, or those of a part of its shards."""
    path, where = Path(source), str(source)
    listing: Listing | None = None
    if path.is_dir() and layout != "table" and not storage.is_remote(where):
        listing = list_files(path, follow_links=bool(options.follow_links))
        _check_links(listing, where, options)
    chosen = _look(path, where, listing, options) if layout == "auto" else layout
    if options.roots and chosen != "table":
        raise ConfigError("applies to tables only", where="--root", hint="Leave it out")
    if options.stacked and chosen not in ("files", "shards"):
        raise ConfigError(
            f"the layout {chosen} has one file for each image, and --channels names several",
            where="--layout",
            hint="Use files: names that are equal up to the first dot belong together, KEY.cls is the class",
        )
    if chosen in ("files", "shards", "flat") and (options.classes or options.labels != "auto"):
        raise ConfigError(f"the layout {chosen} keeps labels as they are", where="--labels, --classes", hint="Leave them out")
    if chosen == "table":
        return _of_table(path, options)
    if chosen == "shards":
        urls = storage.expand(where, store)
        if layout == "auto":
            _check_downloads(path)
        return tars_of(store, urls, use_damaged, listing, options.max_file, options.images, options.stacked, part=options.part)
    if listing is None:
        raise DataError("must be a folder" if path.exists() else "does not exist", where=where, hint="Give another --layout")
    if chosen == "files":
        roots = _allowed_roots(listing.root, options)
        return files_of(store, listing, options.max_file, roots, options.images, options.stacked)
    return _of_folder(listing, where, options, classes=chosen == "folder")


def _look(path: Path, where: str, listing: Listing | None, options: Options) -> Layout:
    if listing is not None:
        if options.stacked and not any(file.extension == "tar" for file in listing.files):
            return "files"  # only there do files of one name belong together
        return recognize(listing, where, frozenset(options.images))
    if path.suffix.lower() in tables.KINDS and path.is_file():
        return "table"
    if path.suffix.lower() == ".tar" or "{" in where or "*" in where or "://" in where:
        return "shards"
    raise DataError(
        "is neither a folder nor a table" if path.exists() else "does not exist",
        where=where,
        hint="Point to a folder with one sub-folder per class, to a .csv, .jsonl or .parquet with the columns path, caption, "
        "label, or to shards such as 'old-{00000..00009}.tar'",
    )


def _check_downloads(path: Path) -> None:
    """Rejects unfinished downloads: an img2dataset shard without its statistics is still being written."""
    if not path.is_dir() or not any(path.glob("[0-9]*_stats.json")):
        return
    open_ones = [shard for shard in sorted(path.glob("[0-9]*.tar")) if not shard.with_name(f"{shard.stem}_stats.json").exists()]
    if open_ones:
        raise DataError(
            f"has no {open_ones[0].stem}_stats.json: img2dataset has not finished this shard"
            + (f", nor {len(open_ones) - 1} others" if len(open_ones) > 1 else ""),
            where=str(open_ones[0]),
            hint="Let the download finish, or give --layout shards to use the tars as they are",
        )


def _check_links(listing: Listing, where: str, options: Options) -> None:
    if options.follow_links is not None:
        return
    lost = lost_by_links(listing, frozenset(options.images))
    if lost:
        links = sum(listing.reasons.get(reason, 0) for reason in (LINK, BROKEN))
        shown = ", ".join(printable(name) for name in lost[:3]) + (" …" if len(lost) > 3 else "")
        raise DataError(
            f"{links} links leave the folder or are broken and are not followed; {len(lost)} of its parts would be lost: {shown}",
            where=where,
            hint="Add --follow-links to pack their targets, if you trust them, or --no-follow-links to leave them out",
        )


def _allowed_roots(root: Path, options: Options) -> tuple[str, ...]:
    """Returns the directories that must contain the files after resolving links; empty for anywhere."""
    return () if options.follow_links else (os.path.realpath(root),)


# ---- images with a class and a caption -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image file that a directory or a table names.

    Attributes:
        path: the file.
        shown: its path as in the source.
        label: class index, or None.
        captions: non-empty texts.
        extra: the table's other columns; written to the ``.json`` member.
        caption_file: a file beside it with its caption.
        owns_caption: the file is counted as this image's; else as that of another image with the same name.
    """

    path: Path | str
    shown: str
    label: int | None = None
    captions: tuple[str, ...] = ()
    extra: Mapping[str, Any] | None = None
    caption_file: File | None = None
    owns_caption: bool = True


@dataclass(frozen=True)
class ImageSource:
    """Single image files; their keys in the shards are numbers. See :class:`pipeline.data.pack.samples.Source`.

    Attributes:
        roots: resolved directories that must contain the files after resolving links; empty for anywhere.
        max_file: maximum size of a file, bytes.
        shared: names of caption files that several images share, with the names of these images.
    """

    entries: Sequence[SourceImage]
    classes: tuple[str, ...]
    digest: str
    unit: str = "files"
    left_out: Sequence[tuple[str, str]] = ()
    notes: Sequence[tuple[str, str]] = ()
    remarks: Sequence[str] = ()
    roots: tuple[str, ...] = field(default=())
    max_file: int = MAX_FILE
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, position: int) -> str:
        """The file's path as in the source."""
        return self.entries[position].shown

    def companions(self, position: int) -> tuple[str, ...]:
        """The caption file, if the image has one of its own."""
        entry = self.entries[position]
        return (entry.caption_file.shown,) if entry.caption_file is not None and entry.owns_caption else ()

    def sharers(self, companion: str) -> tuple[str, ...]:
        """Images that share one caption file, if there are several: ``a.jpg`` and ``a.png`` have ``a.txt``."""
        return self.shared.get(companion, ())

    def key(self, position: int, number: int) -> str:
        """Nine digits."""
        return f"{number:09d}"

    def load(self, position: int) -> Raw:
        """Reads the file; one caption becomes ``.txt``, several the list ``caption`` in ``.json``."""
        entry = self.entries[position]
        members: dict[str, Any] = {}
        notes: tuple[str, ...] = ()
        if entry.label is not None:
            members["cls"] = entry.label
        captions = entry.captions
        if entry.caption_file is not None:
            try:
                text, replaced = decode_text(read_file(entry.caption_file.path, limit=_MAX_CAPTION, roots=self.roots))
            except SkippedSample as error:
                raise SkippedSample(f"caption_{error}") from error
            captions = (text,) if text.strip() else ()
            notes = (REPLACED,) if replaced else () if captions else ("empty_caption",)
        if len(captions) == 1:
            members["txt"] = captions[0]
        several = {"caption": list(captions)} if len(captions) > 1 else {}
        members["json"] = {**(entry.extra or {}), **several, "path": printable(entry.shown)}
        return Raw(read_file(entry.path, limit=self.max_file, roots=self.roots), members, notes=notes)


def _of_folder(listing: Listing, where: str, options: Options, *, classes: bool) -> ImageSource:
    images: list[File] = []
    left_out, remarks = list(listing.left_out), []
    texts: dict[str, File] = {}
    extensions = frozenset(options.images)
    for file in listing.files:
        if file.extension in extensions:
            if file.size:
                images.append(file)
            else:
                left_out.append((file.shown, "empty_file"))
        elif file.extension == _CAPTION:
            texts.setdefault(file.stem, file)
            if texts[file.stem] is not file:
                left_out.append((file.shown, "second_caption"))
        else:
            left_out.append((file.shown, "shard_file" if file.extension == "tar" else "not_an_image"))
    tops = [file.parts[0] if classes and "/" in file.shown else None for file in images]
    usable, without = _usable_classes(images, tops, listing, options)
    if without:
        remarks.append(f"{len(without)} folders contain no usable image and are not a class: {_few(without)}")
    labels = [(file.shown, top if top in usable else None) for file, top in zip(images, tops, strict=True)]
    numbers, names, label_notes = _numbered_folders(labels, sorted(usable), where, options)
    notes = label_notes if usable else []
    deep = sum(len(file.parts) > 2 for file in images) if classes else 0
    if deep:
        remarks.append(f"{deep} images lie in sub-folders of class folders: they belong to the class of the top folder")
    remarks += _doubtful_names(names)
    backslashes = sum("\\" in file.shown for file in images)
    if backslashes:
        remarks.append(f"{backslashes} file names hold a backslash, as zips from Windows leave them: they name no folders here")
    if len(usable) == 1:
        remarks.append(f"all images are of one class, {printable(next(iter(usable)))!r}: --layout flat packs them without")
    stems = {file.stem for file in images}
    sidecars = sum(file.extension == "json" and file.stem in stems for file in listing.files)
    if sidecars:
        remarks.append(f"{sidecars} .json files have the name of an image: --layout files packs them with it, without classes")
    entries: list[SourceImage] = []
    used: dict[str, tuple[str, ...]] = {}
    for file, number in zip(images, numbers, strict=True):
        text = texts.get(file.stem) or texts.get(file.shown)
        name = "" if text is None else text.shown
        entries.append(SourceImage(file.path, file.shown, number, caption_file=text, owns_caption=name not in used))
        if text is not None:
            used[name] = (*used.get(name, ()), printable(file.shown))
    left_out += [(text.shown, "text_without_image") for text in texts.values() if text.shown not in used]
    lines = [f"{file.shown}\0{file.size}" for file in images]
    lines += [f"caption\0{entry.shown}\0{entry.caption_file.size}" for entry in entries if entry.caption_file is not None]
    if not names and any(number is not None for number in numbers):
        lines.append(f"numbers\0{numbers}")
    return ImageSource(
        entries,
        names,
        digest_of("folder", lines),
        left_out=sorted(left_out),
        notes=notes,
        remarks=remarks,
        roots=_allowed_roots(listing.root, options),
        max_file=options.max_file,
        shared={printable(name): sharers for name, sharers in used.items() if len(sharers) > 1},
    )


def _usable_classes(
    images: Sequence[File], tops: Sequence[str | None], listing: Listing, options: Options
) -> tuple[set[str], list[str]]:
    """Returns top-level directories with a readable image, and those that look like a class but have none."""
    usable: set[str] = set()
    for file, top in zip(images, tops, strict=True):
        if top is not None and top not in usable and _seems_complete(file, options):
            usable.add(top)
    if not any(tops):
        return usable, []
    others = {file.parts[0] for file in listing.files if "/" in file.shown}
    with os.scandir(listing.root) as entries:  # the listing does not contain empty directories
        others |= {entry.name for entry in entries if entry.is_dir() and not litter_reason(entry.name)}
    return usable, sorted(others - usable)


def _seems_complete(file: File, options: Options) -> bool:
    """Whether an image's header and end are present; formats that need transcoding count as complete."""
    if options.channels is not None:
        try:
            return sniff(read_file(file.path)) != "none"
        except SkippedSample:
            return False
    if file.extension not in _PROBED:
        return True
    try:
        return inspect_header(read_file(file.path), min_side=1, max_pixels=1 << 62).status in ("ok", "unsupported")
    except SkippedSample:
        return False


def _numbered_folders(
    labels: Sequence[tuple[str, str | None]], classes: Sequence[str], where: str, options: Options
) -> tuple[list[int | None], tuple[str, ...], list[tuple[str, str]]]:
    numbers, names, notes = number_labels(
        [(name, name) for name in classes],
        where=where,
        mode=options.labels,
        classes=options.classes,
        mixed_hint="If the folders are not classes (hashes, dates), add --layout flat; if they are, add --labels names",
    )
    of_class = dict(zip(classes, numbers, strict=True))
    shared = [number for number, n in Counter(number for number in numbers if number is not None).items() if n > 1]
    if shared:
        both = " and ".join(repr(printable(name)) for name in classes if of_class[name] == shared[0])
        hint = "Rename one of them, or join them" + ("" if names else ", or add --labels names to read the numbers as names")
        raise DataError(f"folders {both} are the same class, number {shared[0]}", where=where, hint=hint)
    reasons = dict(notes)
    out_notes = [
        (shown, "no_label" if label is None else reasons.get(label, "no_label"))
        for shown, label in labels
        if label is None or label in reasons
    ]
    return [None if label is None else of_class[label] for _, label in labels], names, out_notes


def _doubtful_names(classes: Sequence[str]) -> list[str]:
    doubtful = maybe_none(classes)
    return [f"class names that may mean no label: {_few(doubtful)}; leave such labels empty if they do"] if doubtful else []


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(printable(name) for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- tables ----------------------------------------------------------------------------------------------------------------


def _of_table(source: Path, options: Options) -> ImageSource:
    rows = list(tables.rows(source))
    if not rows:
        raise DataError("has no rows below its header", where=str(source), hint="Write one row per image")
    numbers, names, notes = number_labels(
        [(row.where, row.label) for row in rows], where=str(source), mode=options.labels, classes=options.classes
    )
    if all(number is None for number in numbers):
        notes = [(index, note) for index, note in notes if note != "empty_label"]
    notes += [(row.where, note) for row in rows for note in row.notes]
    folders = [*options.roots, source.parent]
    # With follow_links, links may lead out of the roots; paths written in the table may not.
    resolve = os.path.abspath if options.follow_links else real_folder
    allowed = tuple(resolve(str(folder)) for folder in folders)
    entries, outside = [], []
    for row, number in zip(rows, numbers, strict=True):
        path = _locate(row.path, folders)
        folder = resolve(os.path.dirname(path))
        if not is_below(folder, allowed):
            outside.append((row.where, row.path, folder))
        entries.append(SourceImage(path, row.path, number, row.captions, row.extra))
    if outside:
        raise _outside(source, outside, len(rows))
    kind = "\0".join(("table", *(str(root) for root in options.roots), *(("anywhere",) if options.follow_links else ())))
    digest = digest_of(kind, (f"{e.shown}\0{e.label}\0{e.captions}\0{e.extra}" for e in entries))
    remarks = _doubtful_names(names)
    measured = ("width", "height")  # the image's own width and height are stored there
    other = dict.fromkeys(name for row in rows for name in row.extra if name not in measured)
    if other:
        remarks.insert(0, f"columns kept in .json alone: {_few([name or '(without a name)' for name in other], 8)}")
    return ImageSource(
        entries, names, digest, "rows", (), notes, remarks, () if options.follow_links else allowed, options.max_file
    )


def _locate(path: str, folders: Sequence[Path]) -> str:
    """Resolves a table's path: in the first of the directories that has it, or else in the last."""
    candidates = [os.path.join(folder, path) for folder in folders]
    if os.path.isabs(path) or len(candidates) == 1:
        return candidates[-1]
    try:
        return next((candidate for candidate in candidates if os.path.lexists(candidate)), candidates[-1])
    except ValueError:  # an invalid file name
        return candidates[-1]


def _outside(source: Path, outside: Sequence[tuple[str, str, str]], total: int) -> DataError:
    row, path, _ = outside[0]
    common = os.path.commonpath([folder for _, _, folder in outside])
    return DataError(
        f"{len(outside)} of {total} paths lie outside the table's folder, the first in {printable(row)}: "
        f"{printable(path, limit=200)}",
        where=str(source),
        hint=f"If you trust the table, name the folder they lie in: --root {printable(common)} (may be given several times)",
    )
