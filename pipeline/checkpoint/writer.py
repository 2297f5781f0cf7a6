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
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.files import Saved, listed, sync
from pipeline.checkpoint.manifest import FORMAT, MANIFEST, WHOLE
from pipeline.checkpoint.retention import Mark, Retention, write_best
from pipeline.checkpoint.snapshot import Snapshot, Staging, whole_tensors
from pipeline.checkpoint.tensor_writer import begins, write_tensors
from pipeline.errors import CheckpointError
from pipeline.methods.base import Recipe
from pipeline.models.tensor_files import opened
from pipeline.training.engine import Engine
from pipeline.untrusted import open_regular, printable

_TEMPORARY = ".tmp-"
_FP32 = 4  # bytes
_ANOTHER = "resume from another one"


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

    def save(self, engine: Engine, recipe: Recipe, facts: dict[str, Any]) -> Path:
        """Write a checkpoint with all ranks and make it current, before training goes on.

        Args:
            engine: whose fragments to write.
            recipe: whose teacher, memory and frozen parameters to write.
            facts: what goes into the manifest; must hold ``step``.

        Raises:
            CheckpointError: on all ranks, if any rank could not write; the checkpoints before are untouched.
        """
        self.finish()
        self._begin(engine, recipe, facts, copy=False)
        outcome = self.finish()
        if outcome is None or outcome.path is None:
            raise (outcome and outcome.problem) or CheckpointError("nothing was written", where=str(self.directory))
        return outcome.path

    def begin(self, engine: Engine, recipe: Recipe, facts: dict[str, Any]) -> Outcome | None:
        """Take a copy of this moment, have it written beside the training, and return; a save under way is waited for first.

        To be followed by a :meth:`poll` at every step boundary, and by :meth:`finish` at the end.

        Returns:
            How the save that was waited for ended, if one was.

        Raises:
            CheckpointError: on all ranks, if as many saves in a row have failed as may.
        """
        before = self.finish()
        self._begin(engine, recipe, facts, copy=True)
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

    def _begin(self, engine: Engine, recipe: Recipe, facts: dict[str, Any], *, copy: bool) -> None:
        name = f"step_{facts['step']:09d}"
        rank = dist.get_rank()
        temporary = self.directory / f"{_TEMPORARY}{name}"
        snapshot = self._staging.take(engine, recipe, rank=rank, copy=copy)
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
        files = [write_tensors(temporary / _rank_file(rank), snapshot.pieces)]
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


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


class _Pieces:
    """Reads any range of any saved tensor out of the rank files, straight to where it is wanted: mapped into memory, a file costs
    a page fault for each of its pages."""

    def __init__(self, saved: Saved) -> None:
        self._path = saved.path
        self._files: list[BinaryIO] = []
        self._begins: list[dict[str, int]] = []
        self._where: dict[str, list[tuple[int, int, int]]] = {}
        self._elements = 0  # that all files can hold
        with ExitStack() as stack:
            for rank, table in enumerate(saved.manifest.get("fragments", [])):
                path = saved.path / _rank_file(rank)
                try:
                    self._files.append(stack.enter_context(os.fdopen(open_regular(path, error=CheckpointError), "rb", 0)))
                    self._begins.append(begins(self._files[-1]))
                except (ValueError, OSError) as error:
                    reason = error.strerror if isinstance(error, OSError) else error
                    raise CheckpointError(f"header unreadable, {reason}", where=printable(str(path)), hint=_ANOTHER) from error
                self._elements += os.fstat(self._files[-1].fileno()).st_size // _FP32
                for name, (start, length) in table.items():
                    self._where.setdefault(name, []).append((start, length, rank))
            self.close = stack.pop_all().close

    def names(self, kind: str) -> set[str]:
        """Which tensors there are of a kind."""
        start = f"{kind}/"
        return {key.removeprefix(start) for held in self._begins for key in held if key.startswith(start)}

    def fill(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """Fills fp32 memory ``[length]`` with a flattened tensor's elements from ``start`` on.

        Raises:
            CheckpointError: it does not have them all.
        """
        if target.device.type != "cpu" or not target.is_contiguous():
            target.copy_(self.read(kind, name, start, target.numel()))
            return
        length = left = target.numel()
        memory = memoryview(target.numpy().data).cast("B")
        for begin, size, rank in self._where.get(name, []):
            low, high = max(begin, start), min(begin + size, start + length)
            place = self._begins[rank].get(f"{kind}/{name}")
            if low < high and place is not None:
                self._files[rank].seek(place + _FP32 * (low - begin))
                wanted = memory[_FP32 * (low - start) : _FP32 * (high - start)]
                while wanted and (count := self._files[rank].readinto(wanted)):  # type: ignore[attr-defined]
                    wanted = wanted[count:]
                left -= high - low - len(wanted) // _FP32
        if left:
            raise CheckpointError(f"{left} elements of {kind}/{name} are not in it", where=str(self._path), hint=_ANOTHER)

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements ``start`` to ``start + length`` of a flattened tensor, fp32 ``[length]``.

        Raises:
            CheckpointError: as :meth:`fill`, before memory is taken for more than the files hold.
        """
        if length > self._elements:
            raise CheckpointError(f"{length} elements of {kind}/{name} are not in it", where=str(self._path), hint=_ANOTHER)
        out = torch.empty(length, dtype=torch.float32)
        self.fill(out, kind, name, start)
        return out


def load(saved: Saved, engine: Engine, recipe: Recipe) -> None:
    """Bring student, moments, teacher and memory to what they were, on any number of ranks.

    Raises:
        CheckpointError: the checkpoint is of another architecture; the first parameters that differ are named.
    """
    ours = {name: list(shape) for name, shape in engine.shapes.items()}
    _compare(ours, saved.manifest.get("shapes", {}), saved.path)
    with closing(_Pieces(saved)) as pieces:
        for f in engine.held():
            pieces.fill(f.master, "master", f.name, f.start)
            for moment, tensor in f.moments.items():
                pieces.fill(tensor, moment, f.name, f.start)
        engine.set_optimizer_steps(int(saved.manifest.get("applied", saved.step)))
        engine.refresh()
        with engine.gathered(write=True):
            _load_whole(saved, recipe, engine)
        for name, start, piece in engine.teacher_pieces(owned=False):
            pieces.fill(piece, "teacher", name, start)


def _load_whole(saved: Saved, recipe: Recipe, engine: Engine) -> None:
    targets = whole_tensors(recipe, engine)
    with opened(saved.path / WHOLE) as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    _compare({k: list(t.shape) for k, t in targets.items()}, {k: list(t.shape) for k, t in stored.items()}, saved.path)
    for name, tensor in stored.items():
        targets[name].detach().copy_(tensor)


def _compare(ours: dict[str, list[int]], theirs: dict[str, list[int]], where: Path) -> None:
    """Refuse tensors of other names or shapes than this run's."""
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if different:
        first = different[0]
        there, here = theirs.get(first, "nothing"), ours.get(first, "nothing")
        raise CheckpointError(
            f"{len(different)} tensors differ, the first is {first}: {there} in the checkpoint, {here} in this run",
            where=str(where),
            hint="resume with the config it was written with, or start a new run",
        )


def read_teacher(saved: Saved) -> Iterator[tuple[str, Tensor]]:
    """The whole teacher out of a checkpoint, without an engine: names as in the recipe, fp32."""
    return _read_whole(saved, "teacher", "teacher")


def read_student(saved: Saved) -> Iterator[tuple[str, Tensor]]:
    """The whole student out of a checkpoint, without an engine: its fp32 masters, and what is frozen; names as in the recipe."""
    return _read_whole(saved, "master", "frozen")


def _read_whole(saved: Saved, sharded: str, whole: str) -> Iterator[tuple[str, Tensor]]:
    with closing(_Pieces(saved)) as pieces:
        names = pieces.names(sharded)
        for name, shape in saved.manifest.get("shapes", {}).items():
            if name in names:
                yield name, pieces.read(sharded, name, 0, math.prod(shape)).view(shape)
    with opened(saved.path / WHOLE) as file:
        for key in file.keys():  # noqa: SIM118
            if key.startswith(f"{whole}/"):
                yield key.removeprefix(f"{whole}/"), file.get_tensor(key)
