"""Checkpoints as files: which there are, whether they are whole. Knows no torch: a launcher looks before it starts ranks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk.

    Attributes:
        path: its directory.
        manifest: the parsed ``manifest.json``.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return int(self.manifest["step"])


def entry(path: Path) -> dict[str, Any]:
    """Name, size and checksum of a file, as the manifest lists it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"name": path.name, "size": path.stat().st_size, "blake2b": digest}


def read(path: Path) -> Saved:
    """One checkpoint by its directory.

    Raises:
        CheckpointError: there is no manifest of a checkpoint in it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if {"format", "step", "files"} <= manifest.keys():
            return Saved(path, manifest)
        problem = "its manifest is of something else"
    except (OSError, ValueError, AttributeError):
        problem = "its manifest cannot be read"
    raise CheckpointError(
        f"this is no whole checkpoint: {problem}", where=str(path / MANIFEST), mend="name a directory step_… of a run"
    )


def listed(directory: Path) -> list[Saved]:
    """Committed checkpoints of a run, oldest first; unreadable manifests are left out."""
    found = []
    for path in sorted(directory.glob("step_*")):
        try:
            found.append(read(path))
        except CheckpointError:
            continue
    return found


def newest(directory: Path) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint whose files all verify, and a sentence for each newer one that was passed over.

    Raises:
        CheckpointError: checkpoints exist, but not one is whole.
    """
    complaints: list[str] = []
    saved = sorted(listed(directory), key=lambda s: s.step, reverse=True)
    for candidate in saved:
        try:
            verify(candidate)
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        return candidate, complaints
    if complaints:
        raise CheckpointError(
            f"none of the {len(saved)} checkpoints is whole; the newest: {complaints[0]}",
            where=str(directory),
            mend="restore one from a copy, or start anew in another run.directory",
        )
    return None, complaints


def verify(saved: Saved) -> None:
    """Compare every file of a checkpoint with its size and checksum.

    Raises:
        CheckpointError: names the first file that is missing, short or changed.
    """
    if saved.manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"format {saved.manifest.get('format')!r}, this fovea reads {FORMAT}",
            where=str(saved.path),
            mend="use the version of fovea that wrote it",
        )
    for known in saved.manifest["files"]:
        path = saved.path / known["name"]
        try:
            now = entry(path)
        except OSError as error:
            now = {"problem": error.strerror}
        if now != known:
            problem = now.get("problem") or ("its bytes have changed" if now["size"] == known["size"] else "its size is wrong")
            raise CheckpointError(
                f"the checkpoint is damaged ({problem})", where=str(path), mend="an older one is taken if there is one"
            )
