"""Mirrors checkpoints to a bucket or another disk during training, and fetches them where the run has none.

Below the target each checkpoint is a folder as in the run directory. Its files are uploaded first and ``manifest.json`` last;
deletion is in the opposite order. A folder with a manifest is therefore complete. Does not import torch.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.files import Saved, fsync_path, read, verify
from pipeline.checkpoint.manifest import MANIFEST, MAX_MANIFEST
from pipeline.checkpoint.retention import Mark, Retention
from pipeline.data.storage import ShardNotFound, Storage, StorageUnavailable
from pipeline.errors import CheckpointError, DataError
from pipeline.untrusted import printable


class Copies:
    """Copies new checkpoints in a background thread; failures are logged and retried with the next checkpoint.

    Args:
        target: URL or folder below which the copies are stored.
        storage: access to the target.
        retention: which copies are kept.
        log: logs a message; called from another thread.
    """

    def __init__(self, target: str, storage: Storage, retention: Retention, log: Callable[[str], None]) -> None:
        self.target, self._storage, self._retention, self._log = target.rstrip("/"), storage, retention, log
        self._waiting: list[Saved] = []
        self._under_way: Saved | None = None
        self._marks: dict[str, Mark] | None = None
        self._changed = threading.Condition()
        self._again_at, self._closing = 0.0, False
        self._thread = threading.Thread(target=self._work, name="copies", daemon=True)

    def start(self, own: Sequence[Saved] = ()) -> None:
        """Starts the thread, first with the run's checkpoints that an earlier attempt did not copy."""
        self._waiting += own
        self._thread.start()

    def offer(self, saved: Saved) -> None:
        """Queues a checkpoint for copying."""
        with self._changed:
            self._waiting.append(saved)
            self._again_at = 0.0
            self._changed.notify_all()

    def pinned(self) -> set[str]:
        """Names of the checkpoints being read at the moment."""
        with self._changed:
            return {self._under_way.path.name} if self._under_way else set()

    def close(self) -> bool:
        """Copies what is queued, with one more attempt each; returns whether everything is copied."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        return not self._waiting

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closing and (not self._waiting or time.monotonic() < self._again_at):
                    self._changed.wait(timeout=max(self._again_at - time.monotonic(), 0.1) if self._waiting else None)
                if not self._waiting:
                    return
                self._under_way = self._waiting[0]
            try:
                self._copy(self._under_way)
                done = True
            except (DataError, OSError) as error:
                done = not self._under_way.path.exists()  # deleted before it was copied
                if not done:
                    name = self._under_way.path.name
                    self._log(f"{name} is not copied yet; training continues and the next checkpoint tries again: {error}")
            with self._changed:
                if done:
                    self._waiting.remove(self._under_way)
                else:
                    self._again_at = time.monotonic() + 600.0
                self._under_way = None
                if not done and self._closing:
                    return

    def _copy(self, saved: Saved) -> None:
        if not saved.path.exists():
            return
        name = saved.path.name
        if self._marks is None:
            self._marks = {}
            for url in _manifests(self._storage, self.target):
                manifest = _manifest(self._storage, url)
                if manifest is not None:
                    self._marks[url.split("/")[-2]] = Mark.of(url.split("/")[-2], manifest)
        copied = _manifest(self._storage, f"{self.target}/{name}/{MANIFEST}") if name in self._marks else None
        if copied is None or Saved(saved.path, copied).id != saved.id:
            if copied is not None:
                self._storage.delete(f"{self.target}/{name}/{MANIFEST}")
            for file in [*(entry["name"] for entry in saved.manifest["files"]), MANIFEST]:
                if not stat.S_ISREG((saved.path / file).lstat().st_mode):
                    raise DataError(
                        "must be a regular file to be copied",
                        where=printable(str(saved.path / file)),
                        hint="Remove links from the checkpoint",
                    )
                self._storage.put(saved.path / file, f"{self.target}/{name}/{file}")
            self._marks[name] = Mark.of(name, saved.manifest)
        for old in self._retention.superfluous(self._marks.values()):
            urls = self._storage.list(f"{self.target}/{old.name}")
            for url in sorted(urls, key=lambda url: not url.endswith(f"/{MANIFEST}")):
                self._storage.delete(url)
            del self._marks[old.name]


def fetch(target: str, directory: Path, storage: Storage) -> tuple[Saved | None, list[str]]:
    """Fetches the newest complete copy into a run that has no checkpoint.

    Args:
        target: where the copies are stored.
        directory: ``<run>/checkpoints``.
        storage: access to the target.

    Returns:
        The checkpoint, now in the run's directory, or ``None`` if there is no copy; and messages to log.

    Raises:
        CheckpointError: copies exist, but none is complete.
        DataError: the storage is unreachable or the disk cannot be written.
    """
    target = target.rstrip("/")
    manifests = {url: manifest for url in _manifests(storage, target) if (manifest := _manifest(storage, url)) is not None}
    complaints = []
    for url, manifest in sorted(manifests.items(), key=lambda item: (item[1].get("serial", 0), item[1]["step"]), reverse=True):
        name = url.split("/")[-2]
        try:
            one = _fetch(url.rpartition("/")[0], name, manifest, directory, storage)
        except CheckpointError as error:
            complaints.append(f"the copy {url} cannot be used: {error}")
            continue
        return one, [*complaints, f"there was no checkpoint in {directory}; {name} was fetched from {target}"]
    if complaints:
        raise CheckpointError(
            f"none of the {len(manifests)} copies is complete; the newest: {complaints[0]}",
            where=target,
            hint="Start a new run with another run.name, or with checkpoint.mirror=null",
        )
    return None, []


def _fetch(folder: str, name: str, manifest: dict[str, Any], directory: Path, storage: Storage) -> Saved:
    temporary = directory / f".tmp-fetched-{name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for entry in manifest["files"]:  # names were validated when the manifest was read
            url = f"{folder}/{entry['name']}"
            if _size(storage, url) != entry["size"]:
                raise CheckpointError(
                    "its size differs from the manifest's", where=url, hint="Use an older one, which is chosen automatically"
                )
            storage.get(url, temporary / entry["name"])
            fsync_path(temporary / entry["name"])
        verify(Saved(temporary, manifest))
        (temporary / MANIFEST).write_text(json.dumps(manifest))
        fsync_path(temporary / MANIFEST)
        fsync_path(temporary)
        temporary.rename(directory / name)
        fsync_path(directory)
    except ShardNotFound as error:
        raise CheckpointError(
            "a file of the checkpoint is missing", where=error.where, hint="Use an older one, which is chosen automatically"
        ) from error
    except OSError as error:
        raise DataError(
            f"a checkpoint cannot be copied here ({error.strerror})",
            where=str(temporary),
            hint="Free space, or check permissions",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read(directory / name)


def _manifests(storage: Storage, target: str) -> list[str]:
    return [url for url in storage.list(target) if re.fullmatch(rf"{re.escape(target)}/step_\d+/{MANIFEST}", url)]


def _manifest(storage: Storage, url: str) -> dict[str, Any] | None:
    """The parsed manifest of a copy; ``None`` if it is missing or unreadable."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            if _size(storage, url) > MAX_MANIFEST:
                return None
            storage.get(url, Path(folder) / MANIFEST)
            return read(Path(folder)).manifest
        except (ShardNotFound, CheckpointError):
            return None


def _size(storage: Storage, url: str) -> int:
    """Size of a copy's file in bytes, before any of it is fetched.

    Raises:
        CheckpointError: it is missing or not a regular file.
        StorageUnavailable: object storage did not respond within the outage timeout.
    """
    try:
        return storage.stat(url).size
    except StorageUnavailable:
        raise
    except DataError as error:
        raise CheckpointError(
            "a file of the checkpoint is missing", where=error.where, hint="Use an older one, which is chosen automatically"
        ) from error
