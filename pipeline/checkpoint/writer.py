"""Checkpoints that are whole or not there, written beside the training.

Layout, one directory a checkpoint, below ``<run>/checkpoints``::

    step_000000120/
      rank_00000.safetensors   a rank's fragments: master/<name>, exp_avg/<name>, exp_avg_sq/<name>, teacher/<name>, fp32, 1-D
      rank_00001.safetensors   …
      whole.safetensors        what is the same on all ranks: memory/<name>, frozen/<name>, teacher/<buffer name>
      manifest.json            written last: counters, data state, config, fragment table, and size and checksum of every file
    best.json                  which of them is the best, if one is asked for

A checkpoint is written to ``.tmp-step_…``, every file synced, and becomes current by one rename; it is pruned by another rename
back to such a name, then deleted. A directory of that name is rubbish and is swept away by the next save. Fragments carry their
place in the whole parameter, so any number of ranks can read what any other number wrote.

A save that does not hold up training goes through three states. *Writing*: every rank has copied its part to host memory, and a
thread of its own writes it. *Committing*: all ranks have learnt, at a later step boundary and in an agreement that they reach at
every step anyway, that all have written; a thread of rank 0 writes the manifest, renames and prunes. Then, again at such a
boundary, all learn how it ended. No thread but the main one ever speaks to another rank.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.checkpoint.files import Saved, listed, rank_file, sync
from pipeline.checkpoint.fragments import ShardedWeights
from pipeline.checkpoint.manifest import FORMAT, MANIFEST, WHOLE
from pipeline.checkpoint.retention import Mark, Retention, write_best
from pipeline.checkpoint.snapshot import Snapshot, Staging
from pipeline.checkpoint.tensor_writer import write_tensors
from pipeline.errors import CheckpointError
from pipeline.methods.base import Method

_TEMPORARY = ".tmp-"


class Saving(IntEnum):
    """What a rank tells the others of its part of a save; the largest of all ranks counts."""

    QUIET = 0
    FAILED = 1
    BUSY = 2


@dataclass(frozen=True)
class Outcome:
    """How a save ended.

    Attributes:
        step: the step it is of.
        path: its directory, or ``None`` if it could not be written.
        problem: why it could not, else ``None``.
        in_a_row: saves that failed one after another, this one included.
    """

    step: int
    path: Path | None
    problem: CheckpointError | None = None
    in_a_row: int = 0


@dataclass
class _Pending:
    """A save under way: where to, and this rank's work at it."""

    temporary: Path
    final: Path
    facts: dict[str, Any]
    job: Future[Any]
    committing: bool = False


class Checkpoints:
    """The checkpoints of one run. All ranks make the same calls at the same steps.

    Args:
        directory: ``<run>/checkpoints``.
        keep_last: how many are kept, but never fewer than two: the newest may turn out to be damaged.
        keep_every: the first at or after each multiple of so many steps is kept for ever; 0 for none.
        keep_best: metric of which the highest is kept too.
        most_failures: saves in a row that may fail beside the training before it is stopped.
        group: a gloo group for agreement between ranks, ``None`` for the default group.
        on_commit: told by rank 0, in another thread, of each checkpoint that is current now.
        pinned: names of checkpoints that must not be deleted just now.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 3,
        keep_every: int = 0,
        keep_best: str | None = None,
        most_failures: int = 3,
        group: dist.ProcessGroup | None = None,
        on_commit: Callable[[Saved], None] | None = None,
        pinned: Callable[[], set[str]] = set,
    ) -> None:
        self.directory, self._group = directory, group
        self._retention, self._most = Retention(keep_last, keep_every, keep_best), most_failures
        self._on_commit, self._pinned = on_commit, pinned
        self._staging, self._in_a_row = Staging(), 0
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._marks: dict[str, Mark] | None = None

    def save(self, engine: ShardedWeights, method: Method, facts: dict[str, Any]) -> Path:
        """Write a checkpoint with all ranks and make it current, before training goes on.

        Args:
            engine: whose fragments to write.
            method: whose teacher, memory and frozen parameters to write.
            facts: what goes into the manifest; must hold ``step``.

        Raises:
            CheckpointError: on all ranks, if any rank could not write; the checkpoints before are untouched.
        """
        self.finish()
        self._begin(engine, method, facts, copy=False)
        outcome = self.finish()
        if outcome is None or outcome.path is None:
            raise (outcome and outcome.problem) or CheckpointError("nothing was written", where=str(self.directory))
        return outcome.path

    def begin(self, engine: ShardedWeights, method: Method, facts: dict[str, Any]) -> Outcome | None:
        """Take a copy of this moment, have it written beside the training, and return; a save under way is waited for first.

        To be followed by a :meth:`poll` at every step boundary, and by :meth:`finish` at the end.

        Returns:
            How the save that was waited for ended, if one was.

        Raises:
            CheckpointError: on all ranks, if as many saves in a row have failed as may.
        """
        before = self.finish()
        self._begin(engine, method, facts, copy=True)
        return before

    @property
    def state(self) -> Saving:
        """What this rank has to say of the save under way."""
        if self._pending is None:
            return Saving.QUIET
        if not self._pending.job.done():
            return Saving.BUSY
        return Saving.FAILED if _failure(self._pending.job) else Saving.QUIET

    def poll(self, agreed: int) -> Outcome | None:
        """Take the save under way a stage further if all ranks are ready; waits for nothing.

        Args:
            agreed: the largest of all ranks' :attr:`state`.

        Returns:
            How the save ended, once, when it has.

        Raises:
            CheckpointError: on all ranks, if as many saves in a row have failed as may.
        """
        pending = self._pending
        if pending is None or agreed == Saving.BUSY:
            return None
        step = int(pending.facts["step"])
        if agreed == Saving.FAILED:
            problem = self._problem(pending)
            self._pending, self._in_a_row = None, self._in_a_row + 1
            if self._in_a_row >= self._most:
                raise problem
            return Outcome(step, None, problem, self._in_a_row)
        if pending.committing:
            self._pending, self._in_a_row = None, 0
            return Outcome(step, pending.final)
        written: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(written, pending.job.result(), group=self._group)
        pending.committing = True
        if dist.get_rank() == 0:
            pending.job = self._thread.submit(self._commit, pending, written)
        return None

    def finish(self) -> Outcome | None:
        """Wait for the save under way, if there is one, and make it current.

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
        """After a failure of the training: speak to no rank, but let rank 0 end what it can end alone."""
        if self._pending is not None and self._pending.committing:
            wait([self._pending.job])

    def _begin(self, engine: ShardedWeights, method: Method, facts: dict[str, Any], *, copy: bool) -> None:
        name = f"step_{facts['step']:09d}"
        rank = dist.get_rank()
        temporary = self.directory / f"{_TEMPORARY}{name}"
        snapshot = self._staging.take(engine, method, rank=rank, copy=copy)
        failed: Exception | None = None
        try:
            if rank == 0:
                self._prepare(temporary)
        except OSError as error:
            failed = error
        dist.barrier(group=self._group)  # nobody writes before there is a directory, or into one that is about to be swept away
        job: Future[Any] = Future()
        if failed is not None:
            job.set_exception(failed)
        else:
            job = self._thread.submit(self._write, temporary, snapshot, rank)
        shapes = {name: list(shape) for name, shape in engine.shapes.items()}
        self._pending = _Pending(temporary, self.directory / name, {**facts, "shapes": shapes}, job)

    def _prepare(self, temporary: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            temporary.rename(self._rubbish(temporary.name))
        temporary.mkdir()

    def _write(self, temporary: Path, snapshot: Snapshot, rank: int) -> dict[str, Any]:
        if rank == 0:
            for stale in self.directory.glob(f"{_TEMPORARY}*"):
                if stale != temporary:
                    shutil.rmtree(stale)
        files = [write_tensors(temporary / rank_file(rank), snapshot.pieces)]
        if rank == 0:
            files.append(write_tensors(temporary / WHOLE, snapshot.whole))
        return {"fragments": snapshot.table, "files": files}

    def _commit(self, pending: _Pending, written: list[dict[str, Any]]) -> None:
        if self._marks is None:
            self._marks = {s.path.name: Mark.of(s.path.name, s.manifest) for s in listed(self.directory)}
        final = pending.final
        files = [file for part in written for file in part["files"]]
        manifest = {
            "format": FORMAT,
            **pending.facts,
            "serial": 1 + max((mark.serial for mark in self._marks.values()), default=0),
            "world": len(written),
            "fragments": [part["fragments"] for part in written],
            "files": sorted(files, key=lambda file: (file["name"] == WHOLE, file["name"])),
        }
        with (pending.temporary / MANIFEST).open("w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        sync(pending.temporary)
        if final.exists():  # an earlier attempt came as far: its checkpoint was damaged since, or the run went back
            self._discard(final)
        pending.temporary.rename(final)
        sync(self.directory)
        self._marks[final.name] = Mark.of(final.name, manifest)
        if best := self._retention.best_of(self._marks.values()):
            write_best(self.directory, self._retention.best or "", best)
        if self._on_commit is not None:
            self._on_commit(Saved(final, manifest))
        for old in self._retention.superfluous(self._marks.values()):
            if old.name not in self._pinned():
                self._discard(self.directory / old.name)
                del self._marks[old.name]

    def _discard(self, path: Path) -> None:
        if path.exists():
            rubbish = self._rubbish(path.name)
            path.rename(rubbish)
            shutil.rmtree(rubbish, ignore_errors=True)  # what cannot be deleted now is swept away by the next save

    def _rubbish(self, name: str) -> Path:
        return self.directory / f"{_TEMPORARY}old-{os.urandom(4).hex()}-{name.removeprefix(_TEMPORARY)}"

    def _problem(self, pending: _Pending) -> CheckpointError:
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, _failure(pending.job), group=self._group)
        told = next((f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure), "a rank failed")
        return CheckpointError(
            f"the checkpoint could not be written ({told})",
            where=str(pending.temporary),
            hint="free space or hint the directory; the last good checkpoint is untouched and the run resumes from it",
        )


def _failure(job: Future[Any]) -> str:
    """Why a piece of work failed, in words; empty if it did not. What is no failure of the disk is raised here."""
    error = job.exception()
    if error is None:
        return ""
    if isinstance(error, OSError | MemoryError):
        return str(error) or type(error).__name__
    raise error
