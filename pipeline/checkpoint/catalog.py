"""Lists a run's checkpoints without parsing every manifest, which would take 1 to 3 ms each. Does not import torch.

``catalog.jsonl`` beside the checkpoints has a line for each that was committed: the fields of :class:`Row`, and the size and
time of the manifest they were read from. A line that does not match its manifest is ignored and the manifest is read; so are all
manifests in a directory without a catalog. Only the training run writes it; what is resumed is verified with its manifest.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.checkpoint.files import Saved, read
from pipeline.checkpoint.manifest import MANIFEST
from pipeline.checkpoint.retention import Mark
from pipeline.errors import CheckpointError, FoveaError
from pipeline.untrusted import open_regular

CATALOG = "catalog.jsonl"
_LINE = 1 << 20  # maximum size of a line, bytes
_READ = 256 << 20  # bytes that are read of a catalog; the manifests of later lines are read instead
_SPARE = 64  # lines of deleted checkpoints beyond which the file is rewritten


@dataclass(frozen=True)
class Row:
    """What lists and the choice of a checkpoint need of a manifest.

    Attributes:
        name: of the checkpoint's directory.
        step: completed optimizer steps.
        serial: sequence number within the run.
        samples: samples seen.
        world: number of ranks that wrote it.
        zero: its ZeRO stage.
        scores: of evaluations at this step.
        files: names and sizes in bytes.
        origins: ``id`` and ``path`` of the checkpoints that earlier attempts started from, by ``checkpoint.resume``.
    """

    name: str
    step: int
    serial: int
    samples: int | None
    world: int | None
    zero: int | None
    scores: Mapping[str, float]
    files: tuple[tuple[str, int], ...]
    origins: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, name: str, manifest: Mapping[str, Any]) -> Row:
        """The row of a checkpoint, from its manifest."""
        train = (manifest.get("config") or {}).get("train")
        zero = train.get("zero_stage") if isinstance(train, dict) else None
        mark = Mark.of(name, manifest)
        return cls(
            name,
            mark.step,
            mark.serial,
            manifest.get("samples_seen"),
            manifest.get("world"),
            zero if type(zero) is int else None,
            mark.scores,
            tuple((file["name"], file["size"]) for file in manifest["files"]),
            tuple((origin["id"], origin["path"]) for origin in manifest.get("origins", [])),
        )

    @cached_property
    def mark(self) -> Mark:
        """What the retention rule uses."""
        return Mark(self.name, self.step, self.serial, self.scores)

    @cached_property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(size for _, size in self.files)


def rows(directory: Path) -> list[Row]:
    """The committed checkpoints of a run in the order in which they were written; unreadable manifests are skipped.

    Args:
        directory: ``<run>/checkpoints``.
    """
    known = _read(directory / CATALOG)
    result = []
    for name in sorted(entry.name for entry in _entries(directory) if entry.name.startswith("step_")):
        key, row = known.get(name, (None, None))
        if row is None or key != _key(f"{directory}/{name}"):
            try:
                row = Row.of(name, read(directory / name).manifest)
            except CheckpointError:
                continue
        result.append(row)
    return sorted(result, key=lambda row: (row.serial, row.step))


def latest(directory: Path) -> Saved | None:
    """The checkpoint that was written last and has a readable manifest; its files are not verified."""
    for row in reversed(rows(directory)):
        with contextlib.suppress(CheckpointError):
            return read(directory / row.name)
    return None


class Catalog:
    """Keeps the catalog of a run's checkpoints; one process writes it.

    Args:
        directory: ``<run>/checkpoints``.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / CATALOG
        self._lines = -1  # of the file; unknown

    def add(self, row: Row, others: Iterable[Row]) -> None:
        """Adds a checkpoint that was committed. What cannot be written is read from the manifests later.

        Args:
            row: the new checkpoint.
            others: the other checkpoints, for which lines are written if the file has too many others, or none at all.
        """
        with contextlib.suppress(OSError):
            kept = [row, *others]
            if self._lines < 0 or self._lines > len(kept) + _SPARE:
                temporary = self._path.with_name(f".{CATALOG}")
                temporary.write_text("".join(map(self._line, kept)))
                temporary.replace(self._path)
                self._lines = len(kept)
            else:
                with self._path.open("a") as file:
                    file.write(self._line(row))
                self._lines += 1

    def _line(self, row: Row) -> str:
        key = _key(f"{self._path.parent}/{row.name}")
        return "" if key is None else json.dumps({"key": key, **asdict(row)}) + "\n"


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(directory))
    except OSError:
        return []


def _key(path: str) -> tuple[int, int] | None:
    """Size and time of a checkpoint's manifest."""
    try:
        about = os.stat(f"{path}/{MANIFEST}", follow_symlinks=False)
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns


def _read(path: Path) -> dict[str, tuple[tuple[int, int], Row]]:
    """The lines of a catalog by the checkpoint's name, the last of each; those that are none are skipped."""
    known: dict[str, tuple[tuple[int, int], Row]] = {}
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            while file.tell() < _READ and (line := file.readline(_LINE)):
                if (entry := _parse(line)) is not None:
                    known[entry[1].name] = entry
    except (OSError, FoveaError):
        return known
    return known


def _parse(line: bytes) -> tuple[tuple[int, int], Row] | None:
    try:
        document = json.loads(line)
        key, files, origins = (document.pop(name) for name in ("key", "files", "origins"))
        row = Row(**document, files=tuple(map(tuple, files)), origins=tuple(map(tuple, origins)))
        return ((key[0], key[1]), row) if _is_valid(row) else None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None


def _is_valid(row: Row) -> bool:
    numbers = (row.step, row.serial, *(size for _, size in row.files))
    optional = (row.samples, row.world, row.zero)
    texts = (row.name, *(name for name, _ in row.files), *(text for origin in row.origins for text in origin))
    return (
        all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        and all(number is None or type(number) is int for number in optional)
        and all(type(text) is str for text in texts)
        and all(type(name) is str and type(score) in (int, float) for name, score in row.scores.items())
        and all("/" not in name and name not in ("", "..") for name, _ in row.files)
    )
