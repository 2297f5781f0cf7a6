"""Accounts for everything a packing has seen: packed, or left out with a reason, and listed beside the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pipeline.data import storage
from pipeline.data.pack.samples import Source
from pipeline.errors import DataError
from pipeline.untrusted import printable

WITH_IMAGE = "with_image"  # the reason for a caption or another member whose image is left out
_NOTE = "+"  # prefix of the journal's lines that are notes, not reasons
Names = tuple[tuple[str, str], ...]
# Explains reasons and notes that are not obvious, and how to fix them; those of images are in the index.
REASONS = {
    "outside_link": "links that leave the source: --follow-links packs what they lead to",
    "broken_link": "links that lead to nothing",
    "link_loop": "links to a folder that they lie in, or that too many links lead to",
    "hidden": "names that begin with a dot; such a folder counts once and is not entered (snapshots, .git)",
    "litter": "left by operating systems and file servers; such a folder counts once and is not entered",
    "special_file": "devices, pipes and sockets",
    "not_an_image": "other kinds of files",
    "text_without_image": "a .txt beside no image of the same name",
    "second_caption": "another .txt of the same image",
    "empty_file": "no bytes",
    "with_image": "captions and other members of images that are left out",
    "shard_file": "tars beside images: --layout shards reads them",
    "not_a_shard": "files beside the tars",
    "unselected": "samples that --selection leaves out",
    "nested_shard": "tars in sub-folders: 'FOLDER/**/*.tar' names them too",
    "unreadable": "cannot be read: check the permissions",
    "unreadable_folder": "folders that cannot be listed, so what they hold is not counted: check the permissions",
    "bookkeeping": "statistics and tables that img2dataset writes",
    "file_too_large": "larger than --max-file-mb",
    "missing_file": "the table names it, but it is not there; relative paths begin at the table's folder, or at --root",
    "other_channels": "another number of channels than --channels",
    "other_dtype": "values of another type than --channels",
    "other_size": "the files of one image differ in width or height",
    "unsupported": "the decoder does not read it: --transcode converts what Pillow reads (not HEIC)",
}
NOTES = {
    "caption_replaced": "captions that are not UTF-8 or contain half characters: U+FFFD replaces invalid bytes",
    "text_replaced": "other columns with half characters: U+FFFD replaces them",
    "caption_list": "texts that look like a list in brackets: JSON lines and Parquet can hold several captions",
    "empty_caption": "the file of the caption is empty",
    "no_label": "images beside the class folders, or in one without a class",
    "empty_label": "no label",
    "negative_label": "a negative label means none",
    "label_replaced": "class names with characters that cannot be written: escapes replace them",
    "key_changed": "keys that lead out of a folder, or hold control characters",
    "key_numbered": "keys that occur again have a number behind them",
    "second_image": "another image of the same key: it is packed, but training reads one of them",
    "extension_changed": "extensions with control characters",
}


@dataclass(frozen=True)
class Account:
    """Totals over everything in a source: ``seen = packed + companions + left_out``, always.

    Attributes:
        unit: what is counted: ``files``, ``rows`` or ``members``.
        seen: total number.
        packed: samples written, each counted as its image.
        companions: files or members written with them: captions, labels, JSON.
        left_out: counts by reason.
        noted: counts by note of samples that are packed with something replaced or missing.
    """

    unit: str = "files"
    seen: int = 0
    packed: int = 0
    companions: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)

    @property
    def balances(self) -> bool:
        """Whether the equation holds."""
        return self.seen == self.packed + self.companions + sum(self.left_out.values())

    def text(self) -> str:
        """Returns the equation in one line."""
        beside = f" + {self.companions:,} packed with them" if self.companions else ""
        total = sum(self.left_out.values())
        return f"{self.seen:,} {self.unit} seen = {self.packed:,} packed{beside} + {total:,} left out"


def settle(source: Source, packed: int, skipped: Sequence[tuple[str, str]], notes: Sequence[tuple[str, str]]) -> Account:
    """Returns the account of a completed packing.

    Args:
        source: what was packed.
        packed: samples written.
        skipped: (name, reason) of everything left out.
        notes: (name, note) of what is packed with something replaced or missing.

    Raises:
        DataError: the numbers do not add up.
    """
    left_out = dict(sorted(Counter(reason for _, reason in skipped).items()))
    companions = sum(len(source.companions(position)) for position in range(len(source)))
    account = Account(
        unit=source.unit,
        seen=len(source) + companions + len(source.left_out),
        packed=packed,
        companions=companions - left_out.get(WITH_IMAGE, 0),
        left_out=left_out,
        noted=dict(sorted(Counter(note for _, note in notes).items())),
    )
    if not account.balances:
        hint = "Pack again with --overwrite; if the error persists, report it as a bug of fovea"
        raise DataError(f"the counts do not add up: {account.text()}", hint=hint)
    return account


def write_lists(source: Source, out: Path, prefix: str, journal: IO[bytes], complete: bool) -> tuple[Names, Names]:
    """Writes lists beside the shards: what was left out, and what was packed with changes.

    Args:
        source: what was packed.
        out: directory of the shards.
        prefix: of their names.
        journal: lines of :func:`left_out_line` and :func:`note_line`.
        complete: the lists exist already.

    Returns:
        (name, reason) of everything left out and (name, note), both by name.
    """
    paths = out / f"{prefix}.skipped.txt", out / f"{prefix}.notes.txt"
    if complete:
        skipped, notes = (_pairs(path.read_bytes() if path.exists() else b"") for path in paths)
        return tuple(skipped), tuple(notes)
    journal.flush()
    journal.seek(0)
    pairs = _pairs(journal.read())
    skipped = [(name, reason) for name, reason in pairs if not reason.startswith(_NOTE)]
    gone = {name for name, _ in skipped}
    skipped = [
        (name, reason)
        for name, reason in skipped
        if reason != WITH_IMAGE or gone.issuperset(source.sharers(name))  # another image may still have it
    ]
    notes = [(name, reason.removeprefix(_NOTE)) for name, reason in pairs if reason.startswith(_NOTE)]
    skipped += [(printable(name), reason) for name, reason in source.left_out]
    notes += [(printable(name), note) for name, note in source.notes]
    for path, entries in zip(paths, (skipped, notes), strict=True):
        entries.sort()
        if entries:
            storage.write_atomically(path, "".join(f"{reason}\t{name}\n" for name, reason in entries).encode())
        else:
            path.unlink(missing_ok=True)
    if source.classes:
        storage.write_atomically(out / "classes.txt", "".join(f"{name}\n" for name in source.classes).encode())
    return tuple(skipped), tuple(notes)


def _pairs(data: bytes) -> list[tuple[str, str]]:
    """Parses (name, reason) of each line."""
    lines = data.decode("utf-8", "replace").split("\n")
    split = [line.split("\t", 1) for line in lines if line]
    return sorted((parts[-1], parts[0]) for parts in split)


def left_out_line(reason: str, name: str) -> bytes:
    """Returns a line of the journal for something left out."""
    return f"{reason}\t{printable(name)}\n".encode()


def note_line(note: str, name: str) -> bytes:
    """Returns a line of the journal for a sample that is packed with something replaced or missing."""
    return left_out_line(_NOTE + note, name)
