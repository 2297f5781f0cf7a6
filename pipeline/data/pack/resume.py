"""Progress of a packing in ``<prefix>.pack.json``, from which the same command resumes.

Shards that are finished while a command runs are appended to a file beside it, and written into it at the next start and at the
end, so that a packing of many shards writes a line for each.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data import storage
from pipeline.data.pack.account import Account
from pipeline.data.pack.delivery import Delivery
from pipeline.data.pack.samples import MAX_FILE, Source
from pipeline.errors import DataError
from pipeline.untrusted import read_json

FORMAT = 2  # 2: the rules for listing sources have changed


@dataclass(frozen=True)
class Piece:
    """A finished shard.

    Attributes:
        name: name of the file.
        bytes: its size.
        samples: samples in it.
        rewritten: images in it that were transcoded or downscaled.
        following: number of samples of the source processed when it was full.
        skipped: length of the list of those left out by then, bytes.
    """

    name: str
    bytes: int
    samples: int
    rewritten: int
    following: int
    skipped: int


class PackState:
    """Content of ``<prefix>.pack.json``: the settings of a packing and its finished shards.

    Args:
        out: directory of the shards.
        prefix: of their names.
        settings: of the packing; other values mean another packing.
        source: what is packed.
        delivery: the bucket to which finished shards are sent, if any.

    Attributes:
        account: the account of a completed packing.
    """

    def __init__(
        self, out: Path, prefix: str, settings: dict[str, Any], source: Source, delivery: Delivery | None = None
    ) -> None:
        self._out, self._prefix, self._classes, self._delivery = out, prefix, source.classes, delivery
        self._path, self._added = out / f"{prefix}.pack.json", out / f".{prefix}.pack.tmp"
        self.account: Account | None = None
        named = "\0".join((source.digest, *source.classes)).encode("utf-8", "surrogateescape")
        self._settings: dict[str, Any] = {**settings, "source": hashlib.blake2b(named, digest_size=16).hexdigest()}
        if source.max_file != MAX_FILE:
            self._settings["max_file"] = source.max_file

    def load(self, overwrite: bool, journal: int) -> tuple[list[Piece], bool]:
        """Returns the shards to keep, and whether they are all; removes what cannot be kept.

        Args:
            overwrite: keep nothing.
            journal: length of the list of samples left out, bytes.

        Raises:
            DataError: shards of another packing exist.
        """
        prefix = glob.escape(self._prefix)
        existing = sorted(self._out.glob(f"{prefix}-[0-9]*.tar"))
        self._check_classes(existing)
        document = self._read()
        if not overwrite and (existing or (self._delivery is not None and document is not None)):
            self._check(document, existing)
        for torn in self._out.glob(f".{prefix}-[0-9]*.tar.*.tmp"):
            torn.unlink()
        for torn in self._out.glob(f".{prefix}.pack.json.*.tmp"):  # left by a process killed while it wrote this state
            torn.unlink()
        pieces: list[Piece] = []
        complete = False
        if not overwrite and document is not None:
            for piece in (Piece(**entry) for entry in (*document["shards"], *self._added_pieces(document))):
                path = self._out / piece.name
                near = path.is_file() and path.stat().st_size == piece.bytes
                if not near and not (self._delivery is not None and self._delivery.has(piece.name, piece.bytes)):
                    break
                pieces.append(piece)
            complete = bool(document["complete"]) and len(pieces) == len(document["shards"])
            self.account = Account(**document["account"]) if document.get("account") else None
            if not complete and pieces and journal < pieces[-1].skipped:
                pieces = []  # without the list of those left out, nothing can be resumed
        kept = {piece.name for piece in pieces}
        for path in existing:
            if path.name not in kept:
                path.unlink()
        return pieces, complete

    def save(self, pieces: Sequence[Piece], account: Account | None = None) -> None:
        """Writes the progress atomically; with the account it is complete."""
        document = {
            "format": FORMAT,
            "complete": account is not None,
            "settings": self._settings,
            "shards": [asdict(piece) for piece in pieces],
            "account": None if account is None else asdict(account),
        }
        storage.write_atomically(self._path, (json.dumps(document, indent=1) + "\n").encode())
        self._added.unlink(missing_ok=True)  # after a kill before this line it holds what the document has too

    def add(self, pieces: Sequence[Piece]) -> None:
        """Records the last of these shards as finished."""
        line = json.dumps({"at": len(pieces) - 1, **asdict(pieces[-1])}) + "\n"
        with self._added.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _added_pieces(self, document: dict[str, Any]) -> list[dict[str, Any]]:
        """Entries of shards that follow those of the document; a line that was not written completely ends them."""
        entries: list[dict[str, Any]] = []
        if document["complete"] or not self._added.is_file():
            return entries
        for line in self._added.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                at = entry.pop("at")
                Piece(**entry)
            except (ValueError, TypeError, KeyError, AttributeError):
                break
            if at == len(document["shards"]) + len(entries):
                entries.append(entry)
        return entries

    def _read(self) -> dict[str, Any] | None:
        try:
            document = read_json(self._path)
            [Piece(**entry) for entry in document["shards"]]
            if document.get("account"):
                Account(**document["account"])
            return document if {"settings", "complete", "format"} <= document.keys() else None
        except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _check(self, document: dict[str, Any] | None, existing: Sequence[Path]) -> None:
        hint = "Choose another directory or prefix, or allow overwriting (--overwrite)"
        if document is None:
            raise DataError(f"{len(existing)} shards exist already", where=str(existing[0]), hint=hint)
        where = str(existing[0]) if self._delivery is None else f"{self._delivery.target}{self._prefix}"
        number = len(existing) if self._delivery is None else len(document["shards"])
        if document["format"] != FORMAT:
            what = f"{number} shards were packed by another version of fovea, which listed sources by other rules"
            raise DataError(what, where=where, hint=hint)
        old = document["settings"]
        changed = [name for name in {**self._settings, **old} if old.get(name) != self._settings.get(name)]
        if changed:
            changes = ", ".join(
                "the source is another" if name == "source" else f"{name} was {old.get(name)} and is {self._settings.get(name)}"
                for name in changed
            )
            what = f"{number} shards exist already, of another packing ({changes})"
            raise DataError(
                what,
                where=where,
                hint=f"Repeat the command with the same settings to continue where it stopped. {hint}",
            )

    def _check_classes(self, own: Sequence[Path]) -> None:
        """Shards of two prefixes in one directory must share the class indices, or labels would differ in meaning."""
        path = self._out / "classes.txt"
        others = not set(self._out.glob("*.tar")) <= set(own) or (self._delivery is not None and self._delivery.has_other_shards)
        if not self._classes or not path.is_file() or not others:
            return
        old = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        if old != list(self._classes):
            different = sorted(set(old) ^ set(self._classes))
            raise DataError(
                f"has other classes than this source ({len(old)} and {len(self._classes)}"
                + (f"; only one of them has {different[0]!r})" if different else ")"),
                where=str(path),
                hint=f"Use its numbers with --classes {path}, or choose another OUT: the same number would mean another class",
            )
