"""Detects the layout of a directory; rejects an ambiguous directory with all candidates."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from pipeline.data.index.captions import encoding_of
from pipeline.data.pack.delimited import DELIMITERS
from pipeline.data.pack.listing import File, Listing
from pipeline.data.pack.samples import IMAGES
from pipeline.data.pack.tables import INSTALL_PYARROW
from pipeline.data.storage.parquet import open_pyarrow
from pipeline.errors import DataError
from pipeline.untrusted import printable

Layout = Literal["auto", "folder", "flat", "table", "files", "shards"]
LAYOUTS: tuple[Layout, ...] = ("auto", "folder", "flat", "table", "files", "shards")
TABLES = ("csv", "tsv", "jsonl", "parquet")
_CHUNK_FOLDER = re.compile(r"\d{5,}")
_CHUNK_STATS = re.compile(r"\d{5,}_stats\.json")
# Also matches names with additions: ``train2017``, ``test_images``, ``images_val``.
_SPLIT = re.compile(
    r"(images?[-_ ]?)?(train|training|trainval|val|valid|validation|dev|test|testing|eval|unlabell?ed)(set)?"
    r"([-_ ]?(images?|data|\d+))*"
)


def recognize(listing: Listing, where: str, extensions: frozenset[str] = frozenset(IMAGES)) -> Layout:
    """Detects the layout of a directory.

    Args:
        listing: its content.
        where: the directory, for messages.
        extensions: of images.

    Raises:
        DataError: the layout is ambiguous, or nothing can be packed.
    """
    top = [file for file in listing.files if "/" not in file.shown]
    images = [file for file in listing.files if file.extension in extensions]
    tars = [file for file in top if file.extension == "tar"]
    tables = [file for file in top if file.extension in TABLES and _names_images(file)]
    if not images and not tars:
        raise _nothing(listing, where)
    if not images:
        return "shards"
    top_images = sum("/" not in file.shown for file in images)
    readings: list[tuple[str, str]] = []
    if tars:
        readings.append((_count(len(tars), "tar file"), "--layout shards"))
    if tables:
        readings.append((f"the table {printable(tables[0].shown)}", f"name the table: {where.rstrip('/')}/{tables[0].shown}"))
    by_folder = _as_folder(images, top_images)
    if readings:
        _refuse(where, [*readings, by_folder])
    certain = _img2dataset(listing, images)
    if certain is True and not top_images and all(_CHUNK_FOLDER.fullmatch(file.parts[0]) for file in images):
        return "files"
    if certain is not False:
        chunks = sum(bool(_CHUNK_FOLDER.fullmatch(file.parts[0])) for file in images)
        _refuse(
            where, [(f"img2dataset's output with {_count(chunks, 'image')} in numbered folders", "--layout files"), by_folder]
        )
    classes = {file.parts[0] for file in images if "/" in file.shown}
    if top_images and classes:
        flat = f"{_count(len(images), 'image')} without classes", "--layout flat"
        _refuse(where, [by_folder, flat])
    _check_classes(classes, images, where, by_folder)
    return "folder" if classes else "flat"


def _check_classes(classes: set[str], images: list[File], where: str, by_folder: tuple[str, str]) -> None:
    """Rejects top-level directories that look like splits rather than classes, or a single one around the class directories."""
    deep = any(len(file.parts) > 2 for file in images)
    first = printable(f"{where.rstrip('/')}/{min(classes, default='')}")
    if classes and all(_SPLIT.fullmatch(name.lower()) for name in classes) and (deep or len(classes) > 1):
        shown = ", ".join(printable(name) for name in sorted(classes))
        _refuse(where, [(f"splits ({shown})", f"pack each by itself: {first}"), by_folder])
    if len(classes) == 1 and all(len(file.parts) > 2 for file in images):
        inner = {file.parts[1] for file in images}
        flat = f"{_count(len(images), 'image')} without classes", "--layout flat"
        _refuse(where, [(f"{_count(len(inner), 'class folder')} in one folder", f"pack that: {first}"), flat, by_folder])


def is_bookkeeping(file: File) -> bool:
    """Whether a top-level file is one that img2dataset writes beside its shards or chunk directories."""
    return "/" not in file.shown and (
        _CHUNK_STATS.fullmatch(file.shown) is not None or re.fullmatch(r"\d{5,}\.parquet", file.shown) is not None
    )


def extension_counts(counts: Mapping[str, int], most: int = 5) -> str:
    """Formats counts by extension, the most frequent first."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ", ".join(f"{n} {printable(f'.{name}') if name else 'without extension'}" for name, n in ranked[:most])
    return shown + (f" and {len(ranked) - most} other extensions" if len(ranked) > most else "")


def _as_folder(images: list[File], top_images: int) -> tuple[str, str]:
    classes = {file.parts[0] for file in images if "/" in file.shown}
    if not classes:
        return f"{_count(len(images), 'image')} without classes", "--layout flat"
    text = f"{_count(len(images) - top_images, 'image')} in {_count(len(classes), 'class folder')}"
    if top_images:
        text += f" and {_count(top_images, 'image')} beside them without a class"
    return text, "--layout folder"


def _img2dataset(listing: Listing, images: list[File]) -> bool | None:
    """Whether the directory is img2dataset's output in files; None if it looks like it but may be class directories as well."""
    chunked = [file for file in images if len(file.parts) == 2 and _CHUNK_FOLDER.fullmatch(file.parts[0])]
    if not chunked:
        return False
    if any(_CHUNK_STATS.fullmatch(file.shown) for file in listing.files):
        return True if len(chunked) == len(images) else None
    sidecars = {file.stem for file in listing.files if file.extension == "json" and len(file.parts) == 2}
    if not any(file.stem in sidecars for file in chunked):
        return False
    # Keys of img2dataset begin with the number of the chunk.
    return True if len(chunked) == len(images) and all(file.parts[1].startswith(file.parts[0]) for file in chunked) else None


def _names_images(table: File) -> bool:
    """Whether a table has a column or field ``path``."""
    try:
        with open(table.path, "rb") as file:
            start = file.read(1 << 16)
    except OSError:
        return False
    if table.extension == "parquet":
        return _parquet_has_path(table.path)
    first = re.split(r"[\r\n]", start.decode(encoding_of(start), "replace"), maxsplit=1)[0]
    if table.extension == "jsonl":
        return '"path"' in first
    return any(
        name.strip(' "\r') == "path"
        for delimiter in DELIMITERS
        for name in next(iter(csv.reader([first.replace("\0", "")], delimiter=delimiter)), [])
    )


def _parquet_has_path(path: str) -> bool:
    try:
        _, parquet = open_pyarrow(str(path), hint=INSTALL_PYARROW)
    except DataError:
        return True  # perhaps a table: reading it reports what to install
    try:
        return "path" in parquet.read_schema(path).names
    except Exception:  # not a Parquet file: counted as skipped
        return False


def _nothing(listing: Listing, where: str) -> DataError:
    extensions: dict[str, int] = defaultdict(int)
    for file in listing.files:
        extensions[file.extension] += 1
    seen = [extension_counts(extensions)] if extensions else []
    seen += [f"{n} {reason}" for reason, n in listing.reasons.items()]
    hint = "Point to a folder with one sub-folder per class, to a table, or to shards"
    if extensions.get("tar"):
        hint = f"Name the tars in the sub-folders: '{where.rstrip('/')}/**/*.tar'"
    elif {"outside_link", "broken_link"} & listing.reasons.keys():
        hint = "Add --follow-links to follow links that leave the folder, if you trust them"
    return DataError(f"contains no images and no tars (seen: {', '.join(seen) or 'nothing'})", where=where, hint=hint)


def _refuse(where: str, readings: list[tuple[str, str]]) -> None:
    ways = "; or ".join(f"{what} ({how})" for what, how in readings)
    raise DataError(f"fits {len(readings)} layouts: {ways}", where=where, hint="Choose one of them")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
