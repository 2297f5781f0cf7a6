"""What can be packed: a folder of pictures, a table of their paths, what img2dataset left behind, or other shards.

Each source lists its samples in a fixed order and hands out any of them by position; its digest changes with the listing, so a
packing that was stopped goes on over the same samples or not at all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.data import storage, tables, tar
from pipeline.data.judge import Judgement
from pipeline.data.manifest import Fields
from pipeline.errors import DataError

Layout = Literal["auto", "folder", "table", "files", "shards"]
LAYOUTS: tuple[Layout, ...] = ("auto", "folder", "table", "files", "shards")
IMAGES = (*Fields().images, "gif", "avif", "heic", "heif", "jpe", "tga", "ico", "psd", "dds")
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "tiff": "tif", "bmp": "bmp", "jpeg2000": "jp2", "pnm": "ppm"}
_CHUNK_FOLDER = re.compile(r"\d{5,}")


class LeftOut(Exception):
    """A sample that cannot be packed; its text is the reason, one word."""


@dataclass(frozen=True)
class Raw:
    """A sample as its source holds it.

    Attributes:
        image: encoded bytes of the picture.
        members: all else, by extension; the values are what :class:`pipeline.data.pack.ShardWriter` takes.
        extension: of the picture, empty if it follows from the format.
    """

    image: bytes
    members: dict[str, Any]
    extension: str = ""

    def sample(self, image: bytes, judged: Judgement) -> dict[str, Any]:
        """What is written: the picture (perhaps another than the source's) with its companions.

        Args:
            image: encoded bytes.
            judged: what their header says.
        """
        fitting = EXTENSIONS[judged.format]
        if not self.extension:
            about = {**self.members.get("json", {}), "width": judged.width, "height": judged.height}
            return {fitting: image, **self.members, "json": about}
        extension = self.extension if image is self.image or fitting in self.members else fitting
        return {extension: image, **self.members}


class Source(Protocol):
    """Samples by position."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, the position is the class number; empty if the source names none."""

    @property
    def digest(self) -> str:
        """Changes whenever the listing does."""

    def __len__(self) -> int: ...

    def name(self, position: int) -> str:
        """What to call a sample before a person."""

    def key(self, position: int, number: int) -> str:
        """The key of a sample in the shards, where it is the ``number``-th."""

    def load(self, position: int) -> Raw:
        """Reads a sample.

        Raises:
            LeftOut: it cannot be read, or has no picture.
        """


def open_source(
    source: str | Path, *, layout: Layout = "auto", use_damaged: bool = False, store: storage.Storage | None = None
) -> Source:
    """Finds out what a source is, and lists its samples.

    Args:
        source: a folder, a table, or shards by path or pattern.
        layout: ``folder``: pictures, sub-folders are classes. ``table``: see :func:`pipeline.data.tables.rows`. ``files``:
            ``00000/000000000.jpg`` with ``.txt`` and ``.json`` beside it, as img2dataset writes. ``shards``: tars. ``auto``: what
            it looks like.
        use_damaged: take the whole samples of tars that are cut.
        store: how to reach shards.

    Raises:
        DataError: it is none of these, holds nothing, or is not finished.
    """
    path, store = Path(source), store or storage.Storage()
    found = _look(path, str(source)) if layout == "auto" else layout
    if found == "table":
        return Pictures(*_of_table(path))
    if found == "folder":
        return Pictures(*_of_folder(path))
    if found == "files":
        return Members(store, *_of_files(path))
    urls = storage.expand(str(source), store)
    if layout == "auto":
        _check_downloads(path)
    return Members(store, *_of_tars(store, urls, use_damaged))


def _look(path: Path, source: str) -> Layout:
    if path.suffix.lower() in tables.KINDS and path.is_file():
        return "table"
    if path.suffix.lower() == ".tar" or "{" in source or "*" in source or "://" in source:
        return "shards"
    if not path.is_dir():
        raise DataError(
            "is neither a folder nor a table" if path.exists() else "does not exist",
            where=source,
            hint="Point to a folder with one sub-folder a class, to a .csv, .jsonl or .parquet with the columns path, caption, "
            "label, or to shards such as 'old-{00000..00009}.tar'.",
        )
    if any(path.glob("*.tar")):
        return "shards"
    folders = [child for child in path.iterdir() if child.is_dir()]
    chunks = bool(folders) and all(_CHUNK_FOLDER.fullmatch(folder.name) for folder in folders)
    if any(path.glob("*_stats.json")) or (chunks and any(min(folders).glob("*.json"))):
        return "files"
    return "folder"


def _check_downloads(path: Path) -> None:
    """In a folder of img2dataset's, a shard without its statistics is still being written."""
    if not path.is_dir() or not any(path.glob("[0-9]*_stats.json")):
        return
    open_ones = [shard for shard in sorted(path.glob("[0-9]*.tar")) if not shard.with_name(f"{shard.stem}_stats.json").exists()]
    if open_ones:
        raise DataError(
            f"has no {open_ones[0].stem}_stats.json: img2dataset has not finished it"
            + (f", nor {len(open_ones) - 1} others" if len(open_ones) > 1 else ""),
            where=str(open_ones[0]),
            hint="Let the download finish, or give --layout shards to take the tars as they are.",
        )


# ---- pictures with a class and a caption ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Picture:
    """A file that a folder or a table names.

    Attributes:
        path: the file.
        shown: its path as the source says it.
        label: class number, or None.
        captions: texts, none of them empty.
        extra: what else the table says of it; goes to the ``.json`` member.
    """

    path: Path
    shown: str
    label: int | None = None
    captions: tuple[str, ...] = ()
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Pictures:
    """Single files; their keys in the shards are numbers."""

    entries: Sequence[Picture]
    classes: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, position: int) -> str:
        """The file's path as the source says it."""
        return self.entries[position].shown

    def key(self, position: int, number: int) -> str:
        """Nine digits."""
        return f"{number:09d}"

    def load(self, position: int) -> Raw:
        """Reads the file; one caption becomes ``.txt``, several the list ``caption`` in ``.json``."""
        entry = self.entries[position]
        members: dict[str, Any] = {}
        if entry.label is not None:
            members["cls"] = entry.label
        if len(entry.captions) == 1:
            members["txt"] = entry.captions[0]
        several = {"caption": list(entry.captions)} if len(entry.captions) > 1 else {}
        members["json"] = {**(entry.extra or {}), **several, "path": entry.shown}
        return Raw(_read(entry.path), members)


def _of_folder(source: Path) -> tuple[list[Picture], tuple[str, ...], str]:
    classes = tuple(sorted(child.name for child in source.iterdir() if child.is_dir() and not child.name.startswith(".")))
    numbers = {name: number for number, name in enumerate(classes)}
    entries, sizes = [], []
    for path in sorted(source.rglob("*")):
        if path.suffix[1:].lower() in IMAGES and path.is_file():
            inside = path.relative_to(source)
            label = numbers.get(inside.parts[0]) if len(inside.parts) > 1 else None
            entries.append(Picture(path, inside.as_posix(), label))
            sizes.append(path.stat().st_size)
    listing = (f"{entry.shown}\0{size}" for entry, size in zip(entries, sizes, strict=True))
    return entries, classes, _digest("folder", listing)


def _of_table(source: Path) -> tuple[list[Picture], tuple[str, ...], str]:
    rows = list(tables.rows(source))
    labels = [row.label for row in rows if row.label is not None]
    numeric = all(label.isdecimal() for label in labels)
    classes = () if numeric else tuple(sorted(set(labels)))
    numbers = {name: number for number, name in enumerate(classes)}
    entries = [
        Picture(
            source.parent / row.path,
            row.path,
            None if row.label is None else int(row.label) if numeric else numbers[row.label],
            row.captions,
            row.extra,
        )
        for row in rows
    ]
    return entries, classes, _digest("table", (f"{e.shown}\0{e.label}\0{e.captions}\0{e.extra}" for e in entries))


# ---- samples of several members ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)  # there is one for each member of each sample
class Part:
    """Where a member's bytes lie.

    Attributes:
        about: the shard, or the file itself.
        offset: first byte; -1: the whole file.
        size: bytes.
    """

    about: storage.ObjectStat
    offset: int
    size: int

    def read(self, store: storage.Storage) -> bytes:
        """The bytes.

        Raises:
            LeftOut: they cannot be read.
            StorageAway, ShardChanged: that is no fault of the sample.
        """
        if self.offset < 0:
            return _read(Path(self.about.url))
        try:
            return store.read(self.about, self.offset, self.size)
        except (storage.StorageAway, storage.ShardChanged):
            raise
        except DataError as error:
            raise LeftOut("unreadable") from error


@dataclass(frozen=True)
class Members:
    """Samples that have a key already and keep it, with all that belongs to it."""

    store: storage.Storage
    keys: Sequence[str]
    parts: Sequence[dict[str, Part]]
    names: Sequence[str]
    digest: str
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, position: int) -> str:
        """Shard and key."""
        return self.names[position]

    def key(self, position: int, number: int) -> str:
        """Its own; what occurs again gets a number behind it."""
        return self.keys[position]

    def load(self, position: int) -> Raw:
        """Reads all members."""
        parts = self.parts[position]
        image = next((extension for extension in IMAGES if extension in parts), None)
        if image is None:
            raise LeftOut("missing_image")
        members = {extension: part.read(self.store) for extension, part in parts.items() if extension != image}
        return Raw(parts[image].read(self.store), members, image)


def _of_tars(
    store: storage.Storage, urls: Sequence[str], use_damaged: bool
) -> tuple[list[str], list[dict[str, Part]], list[str], str]:
    found: list[tuple[str, str, dict[str, Part]]] = []
    versions = []
    for about in store.stats(urls):
        if isinstance(about, DataError):
            raise about
        url = about.url
        versions.append(f"{url}\0{about.size}\0{about.tag}")
        places: dict[str, list[int]] = {}
        shard = store.open(about)
        try:
            runs, _ = tar.runs(shard, tar.Notes(), use_damaged=use_damaged)
        finally:
            shard.close()
        for key, members in runs:
            parts = {extension: Part(about, member.offset, member.size) for extension, member in members.items()}
            # Members of one key that lie apart are one sample; a second copy of a member makes another sample.
            open_ones = [place for place in places.get(key, []) if not found[place][2].keys() & parts.keys()]
            if open_ones:
                found[open_ones[0]][2].update(parts)
            else:
                places.setdefault(key, []).append(len(found))
                found.append((key, f"{storage.base_name(url)}: {key}", parts))
    keys = _unique(key for key, _, _ in found)
    return keys, [parts for _, _, parts in found], [name for _, name, _ in found], _digest("shards", versions)


def _of_files(source: Path) -> tuple[list[str], list[dict[str, Part]], list[str], str]:
    groups: dict[tuple[str, str], dict[str, Part]] = {}
    listing = []
    for folder in sorted(child for child in source.iterdir() if child.is_dir()):
        for path in sorted(folder.iterdir()):
            split = tar.split_name(path.name)
            if split is None or not path.is_file():
                continue
            size = path.stat().st_size
            groups.setdefault((folder.name, split[0]), {})[split[1]] = Part(storage.ObjectStat(str(path), size, ""), -1, size)
            listing.append(f"{folder.name}/{path.name}\0{size}")
    keys = _unique(key for _, key in groups)
    return keys, list(groups.values()), [f"{folder}/{key}" for folder, key in groups], _digest("files", listing)


def _unique(keys: Iterable[str]) -> list[str]:
    """The keys, those that occurred before with the first free number behind them."""
    wanted = list(keys)
    taken, out, following = set(wanted), [], dict.fromkeys(wanted, -1)
    for key in wanted:
        following[key] += 1
        name = key
        if following[key]:
            while (name := f"{key}-{following[key]}") in taken:
                following[key] += 1
            taken.add(name)
        out.append(name)
    return out


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise LeftOut("missing_file") from error
    except OSError as error:
        raise LeftOut("unreadable") from error


def _digest(kind: str, lines: Iterable[str]) -> str:
    digest = hashlib.blake2b(kind.encode() + b"\0", digest_size=16)
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0\n")
    return digest.hexdigest()
