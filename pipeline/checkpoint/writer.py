"""Writes checkpoints atomically, in the background of training.

Layout, one directory per checkpoint, below ``<run>/checkpoints``::

    step_000000120/
      rank_00000.safetensors   a rank's fragments: master/<name>, exp_avg/<name>, exp_avg_sq/<name>, teacher/<name>, fp32, 1-D
      rank_00001.safetensors   …
      whole.safetensors        the same on all ranks: memory/<name> (extra state), frozen/<name>, teacher/<buffer name>
      fixed.safetensors        frozen/<name>, teacher/<name> of parameters that no step changes, if only adapters or the last
                               blocks are trained; a hard link to that of an earlier checkpoint, where there are such links
      manifest.json            written last: counters, data state, config, fragment table, size and checksum of every file
    best.json                  the best checkpoint, if keep_best is set

A checkpoint is written to ``.tmp-step_…``, every file is synced, and a rename commits it. Deletion first renames it back to
such a name. Leftover directories of that name are deleted by the next save. Fragments record their position in the whole
parameter, so a checkpoint can be read with any world size.

A save passes through two states and ends with an outcome. *Writing*: every rank has copied its part to host memory, and a
background thread writes it. *Committing*: at a later step boundary all ranks have learned, in an all-reduce that happens at every
step anyway, that all have written; a thread of rank 0 writes the manifest, renames and prunes. At another such boundary all ranks
learn the *outcome*.
Only the main thread communicates with other ranks; for the copies on other nodes, a group of their own is used by the thread that
writes. "Rank 0" below is the first rank of each node, where nodes write to their own memory, and what is old is then deleted only
when all have committed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.catalog import Catalog, Row, rows
from pipeline.checkpoint.digests import group_digests
from pipeline.checkpoint.files import Saved, entry, fsync_path, rank_file
from pipeline.checkpoint.fragments import ShardedWeights
from pipeline.checkpoint.manifest import FIXED, FORMAT, MANIFEST, UNSHARDED
from pipeline.checkpoint.neighbours import NodePlace, exchange
from pipeline.checkpoint.retention import Retention, write_best
from pipeline.checkpoint.snapshot import Snapshot, Staging
from pipeline.checkpoint.tensor_writer import write_tensors
from pipeline.errors import CheckpointError, CheckpointWriteError
from pipeline.methods.base import Method

TEMPORARY = ".tmp-"


class Saving(IntEnum):
    """State of a rank's work on a save; ranks agree on the maximum.

    Therefore BUSY > FAILED > IDLE: a save ends only when no rank is busy, since a rank that is still writing must not find its
    directory reused; and a failure on one rank prevails over ranks that are done or have nothing to do.
    """

    IDLE = 0
    FAILED = 1
    BUSY = 2


@dataclass(frozen=True)
class Outcome:
    """Outcome of a save.

    Attributes:
        step: step of the checkpoint.
        path: its directory, or ``None`` if it could not be written.
        error: why it could not, else ``None``.
        consecutive_failures: number of consecutive failed saves, this one included.
    """

    step: int
    path: Path | None
    error: CheckpointError | None = None
    consecutive_failures: int = 0


@dataclass
class _Pending:
    """A save in progress: its paths, and this rank's work on it."""

    temporary: Path
    final: Path
    manifest_fields: dict[str, Any]
    job: Future[Any]
    committing: bool = False


class Checkpoints:
    """The checkpoints of one run. All ranks make the same calls at the same steps.

    Args:
        directory: ``<run>/checkpoints``.
        keep_last: number to keep, at least two, because the newest may turn out to be damaged.
        keep_every: keep the first at or after each multiple of this many steps permanently; 0 for none.
        keep_best: metric whose highest-scoring checkpoint is kept too.
        max_failures: consecutive asynchronous saves that may fail before training is stopped.
        group: a gloo group for agreement between ranks, ``None`` for the default group.
        on_commit: called by rank 0, in another thread, with each committed checkpoint.
        pinned: names of checkpoints that must not be deleted at the moment.
        sign: compute :attr:`digests`.
        fewest: number of newest checkpoints that are kept whatever ``keep_last`` says.
        nodes: this rank among several nodes whose folders are in their own memory: each then holds the files of its ranks and
            those of the node before, and what is the same on all ranks. ``None`` if all ranks share the directory.
        private: write only into a directory that is there and is this user's alone.

    Attributes:
        digests: digests of this rank's part of the checkpoint that was committed last, see
            :func:`pipeline.checkpoint.digests.group_digests`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 3,
        keep_every: int = 0,
        keep_best: str | None = None,
        max_failures: int = 3,
        group: dist.ProcessGroup | None = None,
        on_commit: Callable[[Saved], None] | None = None,
        pinned: Callable[[], set[str]] = set,
        sign: bool = False,
        fewest: int = 2,
        nodes: NodePlace | None = None,
        private: bool = False,
    ) -> None:
        self.directory, self._group = directory, group
        self._retention, self._max_failures = Retention(keep_last, keep_every, keep_best, fewest), max_failures
        self._on_commit, self._pinned, self._sign = on_commit, pinned, sign
        self.digests: dict[str, str] = {}
        self._staging, self._consecutive_failures = Staging(), 0
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._fixed: tuple[Path, dict[str, Any]] | None = None
        self._rows: dict[str, Row] | None = None
        self._catalog = Catalog(directory)
        self._nodes, self._private = nodes, private
        self._leads = nodes.leads if nodes is not None else dist.get_rank() == 0

    def save(self, engine: ShardedWeights, method: Method, manifest_fields: dict[str, Any]) -> Path:
        """Writes and commits a checkpoint synchronously; collective over all ranks.

        Args:
            engine: provides the fragments.
            method: provides teacher, extra state and frozen parameters.
            manifest_fields: content of the manifest; must hold ``step``.

        Raises:
            CheckpointError: on all ranks, if any rank could not write; earlier checkpoints are untouched.
        """
        self.finish()
        self._begin(engine, method, manifest_fields, copy=False)
        outcome = self.finish()
        if outcome is not None and outcome.path is not None:
            return outcome.path
        if outcome is not None and outcome.error is not None:
            raise outcome.error
        raise CheckpointError("nothing was written", where=str(self.directory), hint="See the log of rank 0")

    def begin(self, engine: ShardedWeights, method: Method, manifest_fields: dict[str, Any]) -> Outcome | None:
        """Takes a snapshot, starts writing it in the background, and returns; waits first for a save in progress.

        Must be followed by :meth:`poll` at every step boundary, and by :meth:`finish` at the end.

        Returns:
            The outcome of the save that was waited for, if any.

        Raises:
            CheckpointError: on all ranks, if the maximum of consecutive failed saves is reached.
        """
        before = self.finish()
        self._begin(engine, method, manifest_fields, copy=True)
        return before

    @property
    def state(self) -> Saving:
        """This rank's state of the save in progress."""
        if self._pending is None:
            return Saving.IDLE
        if not self._pending.job.done():
            return Saving.BUSY
        return Saving.FAILED if _failure(self._pending.job) else Saving.IDLE

    def poll(self, agreed: int) -> Outcome | None:
        """Advances the save in progress if all ranks are ready; does not block.

        Args:
            agreed: the maximum of all ranks' :attr:`state`.

        Returns:
            The outcome of the save, once, when it is complete.

        Raises:
            CheckpointError: on all ranks, if the maximum of consecutive failed saves is reached.
        """
        pending = self._pending
        if pending is None or agreed == Saving.BUSY:
            return None
        step = int(pending.manifest_fields["step"])
        if agreed == Saving.FAILED:
            error = self._error(pending)
            self._pending, self._consecutive_failures = None, self._consecutive_failures + 1
            if self._consecutive_failures >= self._max_failures:
                raise error
            return Outcome(step, None, error, self._consecutive_failures)
        if pending.committing:
            self._pending, self._consecutive_failures = None, 0
            if self._leads and self._nodes is not None:
                self._thread.submit(self._prune)  # now that no node needs the one before
            return Outcome(step, pending.final)
        part = dict(pending.job.result())
        self.digests = part.pop("digests")
        written: list[Any] = [None] * dist.get_world_size()
        if self._nodes is not None:
            dist.all_gather_object(written, part, group=self._group)  # the first rank of each node writes a manifest
        else:
            dist.gather_object(part, written if self._leads else None, dst=0, group=self._group)
        pending.committing = True
        if self._leads:
            pending.job = self._thread.submit(self._commit, pending, written)
        return None

    def finish(self) -> Outcome | None:
        """Waits for the save in progress, if any, and commits it.

        Raises:
            CheckpointError: as :meth:`poll`.
        """
        outcome = None
        while self._pending is not None:
            wait([self._pending.job])
            agreed = torch.tensor([int(self.state)], dtype=torch.int32)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group)
            outcome = self.poll(int(agreed))
        return outcome

    def close(self) -> None:
        """Waits for a commit in progress; without communication, so it is safe after another rank failed.

        Does nothing after :meth:`finish`.
        """
        if self._pending is not None and self._pending.committing:
            wait([self._pending.job])

    def release(self) -> None:
        """Waits for the background thread and ends it; nothing can be saved afterwards."""
        self._thread.shutdown(wait=True)

    def _begin(self, engine: ShardedWeights, method: Method, manifest_fields: dict[str, Any], *, copy: bool) -> None:
        """Takes a snapshot and starts writing it. Main thread, collective.

        Args:
            engine, method, manifest_fields: as for :meth:`save`.
            copy: whether the snapshot is a copy, so that training may change the tensors while they are written.
        """
        name = f"step_{manifest_fields['step']:09d}"
        rank = dist.get_rank()
        temporary = self.directory / f"{TEMPORARY}{name}"
        known = self._fixed if self._fixed is not None and self._fixed[0].is_file() else None
        snapshot = self._staging.take(engine, method, unsharded=self._leads, copy=copy, fixed=known is None)
        failed: Exception | None = None
        try:
            if self._leads:
                self._prepare(temporary)
        except OSError as error:
            failed = error
        dist.barrier(group=self._group)  # no rank may write before the directory exists, or into one that is about to be deleted
        job = self._thread.submit(self._write, temporary, snapshot, rank, known, failed)
        shapes = {name: list(shape) for name, shape in engine.shapes.items()}
        self._pending = _Pending(temporary, self.directory / name, {**manifest_fields, "shapes": shapes}, job)

    def _prepare(self, temporary: Path) -> None:
        """Creates an empty directory to write to. Main thread of rank 0, or of the first rank of each node.

        Raises:
            OSError: it cannot be made; or the private folder is not there, or not this user's alone.
        """
        if self._private:
            about = self.directory.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
                raise PermissionError(errno.EPERM, "it is not a folder of this user alone", str(self.directory))
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            temporary.rename(self._trash_path(temporary.name))
        temporary.mkdir()

    def _write(
        self,
        temporary: Path,
        snapshot: Snapshot,
        rank: int,
        known: tuple[Path, dict[str, Any]] | None,
        failed: Exception | None,
    ) -> dict[str, Any]:
        """Writes a rank's files, and copies them to another node; unless the directory could not be made. In the background."""
        try:
            if failed is not None:
                raise failed
            written = self._write_files(temporary, snapshot, rank, known)
        except Exception:
            if self._nodes is not None:  # another node waits for it
                with contextlib.suppress(OSError):
                    exchange(self._nodes, None, temporary / rank_file(self._nodes.source))
            raise
        if self._nodes is not None:
            exchange(self._nodes, temporary / rank_file(rank), temporary / rank_file(self._nodes.source))
        return written

    def _write_files(
        self, temporary: Path, snapshot: Snapshot, rank: int, known: tuple[Path, dict[str, Any]] | None
    ) -> dict[str, Any]:
        """Writes a rank's files; returns its fragment table, file entries for the manifest, and digests. In the background."""
        device = next((tensor.device for tensor in snapshot.pieces.values() if tensor.is_cuda), None)
        if device is not None:
            torch.cuda.set_device(device)  # a new thread starts on the first one
        if self._leads:
            for stale in self.directory.glob(f"{TEMPORARY}*"):
                if stale != temporary:
                    shutil.rmtree(stale)
        files = [write_tensors(temporary / rank_file(rank), snapshot.pieces)]
        if self._leads:
            files.append(write_tensors(temporary / UNSHARDED, snapshot.unsharded))
            if known is not None:
                _linked(known[0], temporary / FIXED)
                files.append(known[1])
            elif snapshot.fixed:
                files.append(self._write_fixed(temporary / FIXED, snapshot.fixed))
        digests = group_digests({**snapshot.pieces, **snapshot.unsharded}) if self._sign else {}
        return {"fragments": snapshot.table, "files": files, "digests": digests}

    def _write_fixed(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Writes what never changes, or shares the file of an earlier attempt's checkpoint that has the same content.
        Background thread of rank 0.
        """
        known = write_tensors(path, tensors)
        same = [row.name for row in rows(self.directory) if (FIXED, known["size"]) in row.files]
        for name in same[-1:]:
            with contextlib.suppress(OSError):
                if entry(self.directory / name / FIXED) == known:  # its bytes, not what its manifest says of them
                    _linked(self.directory / name / FIXED, path)
        return known

    def _commit(self, pending: _Pending, written: list[dict[str, Any]]) -> None:
        """Writes the manifest, renames the directory and prunes old checkpoints. Background thread of rank 0."""
        if self._rows is None:
            self._rows = {row.name: row for row in rows(self.directory)}
        final = pending.final
        own = written[dist.get_rank()]  # of what every node has written, the entry of this one
        files = list({file["name"]: file for part in (*written, own) for file in part["files"]}.values())
        manifest = {
            "format": FORMAT,
            **pending.manifest_fields,
            "serial": 1 + max((row.serial for row in self._rows.values()), default=0),
            "world": len(written),
            "fragments": [part["fragments"] for part in written],
            "files": sorted(files, key=lambda file: (file["name"] == UNSHARDED, file["name"])),
        }
        with (pending.temporary / MANIFEST).open("w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        fsync_path(pending.temporary)
        if final.exists():  # from an earlier attempt: the checkpoint was damaged since, or the run rolled back
            self._delete(final)
        pending.temporary.rename(final)
        fsync_path(self.directory)
        constant = next((file for file in files if file["name"] == FIXED), None)
        self._fixed = (final / FIXED, constant) if constant is not None else None
        row = Row.of(final.name, manifest)
        self._catalog.add(row, (other for name, other in self._rows.items() if name != row.name))
        self._rows[row.name] = row
        marks = [row.mark for row in self._rows.values()]
        if best := self._retention.best_of(marks):
            write_best(self.directory, self._retention.best or "", best)
        if self._on_commit is not None:
            self._on_commit(Saved(final, manifest))
        if self._nodes is None:
            self._prune()

    def _prune(self) -> None:
        """Deletes what need not be kept. Background thread of rank 0, or of the first rank of each node."""
        assert self._rows is not None
        for old in self._retention.superfluous([row.mark for row in self._rows.values()]):
            if old.name not in self._pinned():
                self._delete(self.directory / old.name)
                del self._rows[old.name]

    def _delete(self, path: Path) -> None:
        """Deletes a checkpoint: it ceases to be one before its files go. Background thread of rank 0."""
        if path.exists():
            trash = self._trash_path(path.name)
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)  # what cannot be deleted now is deleted by the next save

    def _trash_path(self, name: str) -> Path:
        """A new name that marks a directory for deletion. Any thread."""
        return self.directory / f"{TEMPORARY}old-{os.urandom(4).hex()}-{name.removeprefix(TEMPORARY)}"

    def _error(self, pending: _Pending) -> CheckpointError:
        """The error of a failed save, naming the first rank that failed. Main thread, collective."""
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, _failure(pending.job), group=self._group)
        first_failure = next((f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure), "a rank failed")
        return CheckpointWriteError(
            f"the checkpoint could not be written ({first_failure})",
            where=str(pending.temporary),
            hint="Free space, or fix the directory; the last good checkpoint is untouched and the run resumes from it",
        )


def _linked(source: Path, path: Path) -> None:
    """Makes a path the same file as another; a copy on a file system without hard links."""
    temporary = path.with_name(f".{path.name}")
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        fsync_path(temporary)
    temporary.replace(path)


def _failure(job: Future[Any]) -> str:
    """Why a job failed, as text; empty if it succeeded. Re-raises exceptions that are not I/O failures."""
    error = job.exception()
    if error is None:
        return ""
    if isinstance(error, OSError | MemoryError):
        return str(error) or type(error).__name__
    raise error
