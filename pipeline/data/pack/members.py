"""Sources whose samples already have keys: the members of tars, and files that share a name up to the first dot."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data import storage
from pipeline.data.index import tar
from pipeline.data.pack.keys import safe_extension, safe_key, unique_keys
from pipeline.data.pack.layouts import is_bookkeeping
from pipeline.data.pack.listing import Listing, litter_reason
from pipeline.data.pack.samples import IMAGES, MAX_FILE, Raw, SkippedSample, read_file
from pipeline.errors import ConfigError, DataError

_COPIES = 64  # copies of one key that a further member may still belong to


@dataclass(frozen=True, slots=True)  # slots save memory: there is one for each member of each sample
class Part:
    """Location of a member's bytes.

    Attributes:
        about: the shard, or the file itself.
        offset: first byte; -1: the whole file.
        size: bytes.
    """

    about: storage.ObjectStat
    offset: int
    size: int

    def read(self, store: storage.Storage, limit: int, roots: Sequence[str]) -> bytes:
        """Returns the bytes.

        Raises:
            SkippedSample: they cannot be read or are too many.
            StorageUnavailable, ShardChanged: not an error of the sample.
        """
        if self.offset < 0:
            return read_file(Path(self.about.url), limit=limit, roots=roots)
        if self.size > limit:
            raise SkippedSample("file_too_large")
        try:
            return store.read(self.about, self.offset, self.size)
        except (storage.StorageUnavailable, storage.ShardChanged):
            raise
        except DataError as error:
            raise SkippedSample("unreadable") from error


@dataclass(frozen=True)
class Members:
    """Samples that keep their key and all members. See :class:`pipeline.data.pack.samples.Source`.

    Attributes:
        store: access to shards.
        keys: of the samples, as written.
        parts: for each sample its members by extension.
        names: display name of each sample.
        roots: resolved directories that must contain the files after resolving links; empty for anywhere.
        max_file: maximum size of a member, bytes.
        images: extensions of the image, in order of preference; or the files that make one, all of them, if ``stacked``.
        stacked: whether several files make an image.
    """

    store: storage.Storage
    keys: Sequence[str]
    parts: Sequence[dict[str, Part]]
    names: Sequence[str]
    digest: str
    classes: tuple[str, ...] = ()
    unit: str = "members"
    left_out: Sequence[tuple[str, str]] = ()
    notes: Sequence[tuple[str, str]] = ()
    remarks: Sequence[str] = ()
    roots: tuple[str, ...] = ()
    max_file: int = MAX_FILE
    images: tuple[str, ...] = IMAGES
    stacked: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, position: int) -> str:
        """Shard or directory, and key."""
        return self.names[position]

    def companions(self, position: int) -> tuple[str, ...]:
        """All members but the image, or but the first if there is no image."""
        parts = self.parts[position]
        image = self._image(parts) or next(iter(parts))
        return tuple(f"{self.names[position]}.{extension}" for extension in parts if extension != image)

    def sharers(self, companion: str) -> tuple[str, ...]:
        """Empty: each member belongs to one sample."""
        return ()

    def key(self, position: int, number: int) -> str:
        """The sample's own key; a number is appended to repeated keys."""
        return self.keys[position]

    def load(self, position: int) -> Raw:
        """Reads all members."""
        parts = self.parts[position]
        image = self._image(parts)
        if image is None or (self.stacked and not parts.keys() >= set(self.images)):
            raise SkippedSample("missing_image")
        read = {extension: part.read(self.store, self.max_file, self.roots) for extension, part in parts.items()}
        return Raw(read.pop(image), read, image)

    def _image(self, parts: dict[str, Part]) -> str | None:
        return next((extension for extension in self.images if extension in parts), None)


class _Groups:
    """Groups members into samples: scattered members of one key form one sample, a second copy of a member begins another."""

    def __init__(self, images: tuple[str, ...], stacked: bool) -> None:
        self._images = frozenset(() if stacked else images)
        self.samples: list[tuple[str, str, dict[str, Part]]] = []
        self.notes: list[tuple[str, str]] = []
        self._places: dict[tuple[str, str], list[int]] = {}

    def next_shard(self) -> None:
        """Starts a new shard: further members belong to none of the samples so far."""
        self._places.clear()

    def add(self, group: str, key: str, name: str, parts: dict[str, Part]) -> None:
        parts = self._cleaned(name, parts)
        indices = self._places.setdefault((group, key), [])
        open_ones = [index for index in indices[-_COPIES:] if not self.samples[index][2].keys() & parts.keys()]
        if open_ones:
            self.samples[open_ones[0]][2].update(parts)
        else:
            indices.append(len(self.samples))
            self.samples.append((key, name, parts))

    def keys(self) -> list[str]:
        """Returns the keys to write; changed ones are noted."""
        clean = [safe_key(key) for key, _, _ in self.samples]
        out = unique_keys(clean)
        for (key, name, parts), safe, unique in zip(self.samples, clean, out, strict=True):
            if sum(extension in self._images for extension in parts) > 1:
                self.notes.append((name, "second_image"))
            if safe != key:
                self.notes.append((name, "key_changed"))
            elif unique != safe:
                self.notes.append((name, "key_numbered"))
        return out

    def _cleaned(self, name: str, parts: dict[str, Part]) -> dict[str, Part]:
        if all(safe_extension(extension) == extension for extension in parts):
            return parts
        out: dict[str, Part] = {}
        for extension, part in parts.items():
            clean = safe_extension(extension)
            while clean in out or (clean != extension and clean in parts):
                clean += "_"
            out[clean] = part
        self.notes.append((name, "extension_changed"))
        return out


def tars_of(
    store: storage.Storage,
    urls: Sequence[str],
    use_damaged: bool,
    listing: Listing | None = None,
    max_file: int = MAX_FILE,
    images: tuple[str, ...] = IMAGES,
    stacked: bool = False,
    *,
    part: tuple[int, int] | None = None,
) -> Members:
    """Returns the samples of shards.

    Args:
        store: access to the shards.
        urls: the shards.
        use_damaged: use the complete samples of truncated tars.
        listing: their directory, if one was given: its other files are left out.
        max_file: maximum size of a member, bytes.
        images, stacked: see :class:`Members`.
        part: number, from 1, and count of parts: only every ``count``-th shard is read; other files belong to the first part.
            Keys are unique within a part: those that shards of two parts have in common stay as they are.

    Raises:
        ConfigError: the part has no shard.
        DataError: a shard cannot be read or is damaged.
    """
    groups = _Groups(images, stacked)
    versions: list[str] = []
    left_out: list[tuple[str, str]] = []
    remarks: list[str] = []
    if listing is not None:
        urls, left_out = _shards_of(listing, urls)
    if part is not None:
        number, count = part
        if number > len(urls):
            hint = "Use fewer parts"
            raise ConfigError(f"part {number} of {count} is empty: there are {len(urls)} shards", where="--part", hint=hint)
        urls, left_out = urls[number - 1 :: count], left_out if number == 1 else []
    for about in store.stats(urls):
        if isinstance(about, DataError):
            raise about
        url = about.url
        versions.append(f"{url}\0{about.size}\0{about.tag}")
        base = storage.base_name(url)
        notes = tar.Notes()
        notes.most_examples = sys.maxsize  # every one is named
        shard = store.open(about)
        try:
            runs, damage = tar.runs(shard, notes, use_damaged=use_damaged)
        finally:
            shard.close()
        if damage:
            remarks.append(f"used in part: {damage}")
        groups.next_shard()
        for key, members in runs:
            litter = _litter_in(key)
            if litter:
                left_out += [(f"{base}: {member.name}", litter) for member in members.values()]
                continue
            parts = {extension: Part(about, member.offset, member.size) for extension, member in members.items()}
            groups.add(url, key, f"{base}: {key}", parts)
        left_out += [(f"{base}: {name}", reason) for reason, names in notes.examples.items() for name in names]
    keys = groups.keys()
    return Members(
        store,
        keys,
        [parts for _, _, parts in groups.samples],
        [name for _, name, _ in groups.samples],
        digest_of("shards", versions),
        left_out=sorted(left_out),
        notes=groups.notes,
        remarks=remarks,
        max_file=max_file,
        images=images,
        stacked=stacked,
    )


def _shards_of(listing: Listing, urls: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the shards of a directory that may be read, and its other files."""
    listed = {str(listing.root / file.shown) for file in listing.files}
    chosen = [url for url in urls if url in listed]
    if not chosen:
        raise DataError(
            f"none of {len(urls)} tars is a regular file in the folder",
            where=str(listing.root),
            hint="Add --follow-links to follow links that leave the folder, if you trust them",
        )
    taken = set(chosen)
    others = [
        (file.shown, "nested_shard" if file.extension == "tar" and "/" in file.shown else "not_a_shard")
        for file in listing.files
        if str(listing.root / file.shown) not in taken
    ]
    return chosen, [*listing.left_out, *others]


def files_of(
    store: storage.Storage,
    listing: Listing,
    max_file: int = MAX_FILE,
    roots: tuple[str, ...] = (),
    images: tuple[str, ...] = IMAGES,
    stacked: bool = False,
) -> Members:
    """Returns the samples of a directory whose files share a name up to the first dot, as img2dataset writes them.

    Args:
        store: access to shards; not used for files.
        listing: the directory.
        max_file: maximum size of a file, bytes.
        roots: resolved directories that must contain the files after resolving links.
        images, stacked: see :class:`Members`.
    """
    groups = _Groups(images, stacked)
    lines, left_out = [], list(listing.left_out)
    for file in listing.files:
        folder, _, base = file.shown.rpartition("/")
        split = tar.split_name(base)
        if is_bookkeeping(file):
            left_out.append((file.shown, "bookkeeping"))
        elif split is None:
            left_out.append((file.shown, "no_extension"))
        else:
            name = f"{folder}/{split[0]}" if folder else split[0]
            part = Part(storage.ObjectStat(file.path, file.size, ""), -1, file.size)
            groups.add(folder, split[0], name, {split[1]: part})
            lines.append(f"{file.shown}\0{file.size}")
    keys = groups.keys()
    return Members(
        store,
        keys,
        [parts for _, _, parts in groups.samples],
        [name for _, name, _ in groups.samples],
        digest_of("files", lines),
        unit="files",
        left_out=sorted(left_out),
        notes=groups.notes,
        roots=roots,
        max_file=max_file,
        images=images,
        stacked=stacked,
    )


def digest_of(kind: str, lines: Iterable[str]) -> str:
    """Hashes a listing, one line per sample: 128 bits in hex."""
    digest = hashlib.blake2b(kind.encode() + b"\0", digest_size=16)
    for line in lines:
        try:
            data = line.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            data = line.encode("utf-8", "surrogatepass")
        digest.update(data + b"\0\n")
    return digest.hexdigest()


def _litter_in(key: str) -> str:
    """Returns why a key is not data: one of its directories is hidden or litter; empty if none is."""
    folders = key.split("/")[:-1]
    return next((reason for name in folders if name not in (".", "..") and (reason := litter_reason(name))), "")
