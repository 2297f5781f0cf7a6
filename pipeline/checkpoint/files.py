"""Finds and verifies checkpoint directories. Does not import torch, so that a launcher can use it before starting ranks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import FORMAT, MANIFEST, read_manifest
from pipeline.errors import CheckpointError
from pipeline.untrusted import printable

DIGEST_BYTES = 16
CHECKSUM = "xxh3"


def _xxh3_128() -> Any:
    import xxhash  # here, so that a machine without it can still run `fovea prove`, which reports it

    return xxhash.xxh3_128()


CHECKSUMS: dict[str, Callable[[], Any]] = {
    CHECKSUM: _xxh3_128,  # ten times as fast as blake2b; protects against damage, not against tampering
    "blake2b": lambda: hashlib.blake2b(digest_size=DIGEST_BYTES),  # used by older checkpoints
}
_PIECE = 1 << 20  # bytes per read; fits into the CPU cache


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
        """Completed optimizer steps, including skipped ones."""
        return int(self.manifest["step"])

    @property
    def serial(self) -> int:
        """Sequence number of the checkpoint within its run; 0 for checkpoints from before it was recorded."""
        return int(self.manifest.get("serial", 0))

    @property
    def id(self) -> str:
        """Digest of the step and the files' checksums; equal only for copies of one checkpoint."""
        text = json.dumps([self.step, self.manifest["files"]], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()

    @property
    def origins(self) -> list[dict[str, str]]:
        """``id`` and ``path`` of the checkpoints that ``checkpoint.resume`` named in earlier attempts, oldest first."""
        return list(self.manifest.get("origins", []))


def fsync_path(path: Path) -> None:
    """Flushes a file or a directory to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rank_file(rank: int) -> str:
    """File name of a rank's fragments."""
    return f"rank_{rank:05d}.safetensors"


def entry(path: Path, kind: str = CHECKSUM) -> dict[str, Any]:
    """Name, size and checksum of a file, as listed in the manifest.

    Args:
        path: the file.
        kind: checksum algorithm, a key of :data:`CHECKSUMS`.
    """
    with path.open("rb", buffering=0) as file:
        return {"name": path.name, "size": os.fstat(file.fileno()).st_size, kind: _digest(file, kind)}


def _digest(file: RawIOBase, kind: str) -> str:
    digest, piece = CHECKSUMS[kind](), memoryview(bytearray(_PIECE))
    while count := file.readinto(piece):
        digest.update(piece[:count])
    return str(digest.hexdigest())


def read(path: Path) -> Saved:
    """Reads the checkpoint in a directory.

    Raises:
        CheckpointError: the directory has no valid checkpoint manifest.
    """
    return Saved(path, read_manifest(path / MANIFEST))


def committed_checkpoints(directory: Path) -> list[Saved]:
    """Committed checkpoints of a run by step; skips unreadable manifests."""
    checkpoints = []
    for path in sorted(directory.glob("step_*")):
        try:
            checkpoints.append(read(path))
        except CheckpointError:
            continue
    return checkpoints


def verify(saved: Saved) -> None:
    """Checks size and checksum of every file of a checkpoint.

    Raises:
        CheckpointError: names the first file that is missing, truncated or changed.
    """
    if saved.manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"format {saved.manifest.get('format')!r}, this version of fovea reads {FORMAT}",
            where=str(saved.path),
            hint="Use the version of fovea that wrote it",
        )
    for known in saved.manifest["files"]:
        path = saved.path / known["name"]
        if problem := _problem(path, known):
            raise CheckpointError(
                f"the checkpoint is damaged ({problem})",
                where=printable(str(path)),
                hint="Resume from an older one, which is chosen automatically if there is one",
            )


def _problem(path: Path, known: dict[str, Any]) -> str:
    """Why a file does not match its manifest entry; empty if it does. A file of the wrong size is not read."""
    kind = next((kind for kind in CHECKSUMS if known.get(kind) is not None), CHECKSUM)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return "it is a link" if error.errno == errno.ELOOP else error.strerror or "it cannot be opened"
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        return "it is not a regular file"
    with open(descriptor, "rb", buffering=0) as file:
        if about.st_size != known["size"]:
            return "its size is wrong"
        try:
            return "" if _digest(file, kind) == known.get(kind) else "its bytes have changed"
        except OSError as error:
            return error.strerror or "it cannot be read"
