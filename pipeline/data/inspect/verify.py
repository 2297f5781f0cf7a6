"""Verifies a data set by decoding every accepted sample, in worker processes.

An image that crashes the decoder ends one process only: the samples being decoded are tried again one by one to find the one at
fault. Progress is recorded in ``verify.jsonl`` in the index directory, so that an interrupted verification continues where it
stopped; a completed one removes the file.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from pipeline.data import storage
from pipeline.data.index.fields import STATUSES
from pipeline.data.index.manifest import Manifest
from pipeline.data.index.shard_table import Shard, ShardTable
from pipeline.data.loader.reader import Reader
from pipeline.errors import DataError
from pipeline.runtime.locks import lock
from pipeline.runtime.process_pool import process_pool
from pipeline.untrusted import parse_json, printable

CHUNK = 128  # samples per task: what an interruption loses, and what is tried again after a crash
_BATCH, _BATCH_PIXELS = 32, 1 << 26  # decoded at once; 64 megapixels are 200 MB

# Explains each reason.
REASONS = {
    "corrupt": "the bytes are not those that were indexed (checksum)",
    "truncated": "the end of the image is missing",
    "unreadable": "the shard cannot be read here",
    "undecodable": "the decoder refuses it",
    "wrong_size": "decodes to another size than its header says",
    "crashes_decoder": "brings the decoder's process down",
    "changed_shard": "the shard changed while it was read",
}


class Decodes(Protocol):
    """Interface of decoders such as :class:`pipeline.data.augment.decode.Decoder`."""

    def decode(self, encoded: list[bytes]) -> list[Any]:
        """Returns one array ``[height, width, 3]`` each, None where decoding failed."""


@dataclass(frozen=True)
class Failure:
    """A sample that cannot be used although the index accepts it.

    Attributes:
        shard: number of the shard in the manifest.
        row: row among its accepted samples.
        reason: one of :data:`REASONS`.
    """

    shard: int
    row: int
    reason: str


@dataclass(frozen=True)
class Verification:
    """Result of a verification.

    Attributes:
        checked: samples decoded or tried.
        failures: by shard and row.
        resumed: number of them that an earlier, interrupted verification had checked.
    """

    checked: int
    failures: tuple[Failure, ...]
    resumed: int = 0

    @property
    def reasons(self) -> dict[str, int]:
        """Returns the number of failures by reason, the most frequent first."""
        return dict(Counter(failure.reason for failure in self.failures).most_common())


@dataclass(frozen=True)
class _Task:
    shard: int
    first: int
    last: int


@dataclass
class _Worker:
    reader: Reader
    decoder: Decodes


_Setup = tuple[str, Callable[[], Decodes], storage.Storage]
_here: list[_Worker] = []  # the worker of this process


def cpu_decoder() -> Decodes:
    """Returns the decoder used in training, with one CPU thread."""
    from pipeline.data.augment.decode import Decoder

    return Decoder()


def verify(
    manifest: Manifest,
    *,
    workers: int | None = None,
    decoder: Callable[[], Decodes] = cpu_decoder,
    progress: Callable[[int, int, str], None] | None = None,
    store: storage.Storage | None = None,
) -> Verification:
    """Reads and decodes every accepted sample, and compares checksum and size with the index.

    Args:
        manifest: a saved manifest: processes read it from its directory.
        workers: processes; None: as many as there are processors and tasks for them.
        decoder: creates the decoder in each process; a function of a module.
        progress: called with (samples done, total samples, a line after the last sample of a shard).
        store: access to the shards.

    Raises:
        DataError: another verification of this index is running, or the index cannot be read.
    """
    tasks = [
        _Task(number, first, min(first + CHUNK, shard.samples))
        for number, shard in enumerate(manifest.shards)
        for first in range(0, shard.samples, CHUNK)
    ]
    with _Notebook(Path(manifest.directory) / "verify.jsonl", manifest.fingerprint) as notebook:
        done = dict(notebook.failures)
        resumed = sum(task.last - task.first for task in done)
        left = Counter(task.shard for task in tasks if task not in done)
        failed = Counter(failure.shard for failures in done.values() for failure in failures)
        checked = resumed
        pending = deque(task for task in tasks if task not in done)
        workers = max(1, min(workers or len(os.sched_getaffinity(0)), len(pending)))
        for task, failures in _run(pending, workers, (manifest.directory, decoder, store or storage.Storage())):
            done[task] = failures
            notebook.add(task, failures)
            checked += task.last - task.first
            left[task.shard] -= 1
            failed[task.shard] += len(failures)
            if progress is not None:
                shard = manifest.shards[task.shard]
                line = f"{shard.name}: {shard.samples} samples, {failed[task.shard]} failed" if not left[task.shard] else ""
                progress(checked, manifest.total, line)
        notebook.finish()
    every = sorted((f for part in done.values() for f in part), key=lambda f: (f.shard, f.row))
    return Verification(checked, tuple(every), resumed)


def exclude(manifest: Manifest, failures: tuple[Failure, ...]) -> Manifest:
    """Marks samples as ``undecodable`` in new sidecars, so that training skips them, and writes the manifest again.

    The fingerprint changes, so a run treats this as different data. A shard that is rewritten is indexed again, without the
    marks.

    Args:
        manifest: the index.
        failures: see :func:`verify`.

    Raises:
        DataError: a sidecar does not belong to the manifest, or the index has changed.
    """
    folder = Path(manifest.directory)
    with (folder / ".lock").open("a") as file:
        lock(file.fileno(), file.name)
        if Manifest.load(folder).shards.version != manifest.shards.version:
            raise DataError("the index is not the one that was verified", where=str(folder), hint="Run the verification again")
        return _excluded(manifest, failures, folder)


def _excluded(manifest: Manifest, failures: tuple[Failure, ...], folder: Path) -> Manifest:
    shards = list(manifest.shards)
    for number in sorted({failure.shard for failure in failures}):
        index = manifest.index(number)
        rows = [failure.row for failure in failures if failure.shard == number]
        index.columns["status"][index.accepted[rows]] = STATUSES.index("undecodable")
        index.save(Path(manifest.sidecars) / index.sidecar)
        shards[number] = Shard.of(index)
    return replace(manifest, shards=ShardTable.of(shards, manifest.rules)).save(folder)


# ---- processes ----------------------------------------------------------------------------------------------------------


def _run(pending: deque[_Task], workers: int, setup: _Setup) -> Iterator[tuple[_Task, tuple[Failure, ...]]]:
    """Yields each task with its failures, in the order of completion."""
    while pending:
        flying: dict[Future[tuple[Failure, ...]], _Task] = {}
        with _pool(workers, setup) as pool:
            try:
                while pending or flying:
                    # Limits the queue: after a crash, every submitted task is a suspect.
                    while pending and len(flying) < 2 * workers:
                        flying[pool.submit(_check, pending[0])] = pending[0]
                        pending.popleft()
                    for job in wait(flying, return_when=FIRST_COMPLETED).done:
                        result = job.result()
                        yield flying.pop(job), result
            except BrokenProcessPool:
                pass
        for job, task in flying.items():
            yield task, job.result() if job.done() and job.exception() is None else _carefully(task, setup)


def _carefully(task: _Task, setup: _Setup) -> tuple[Failure, ...]:
    """Runs a task sample by sample, so that a crash affects one sample's process only."""
    failures: list[Failure] = []
    row = task.first
    while row < task.last:
        with _pool(1, setup) as pool:
            try:
                pool.submit(_started).result()
            except BrokenProcessPool as error:
                hint = "See its message above; `python -c 'import nvidia.nvimgcodec'` shows whether the decoder is installed"
                raise DataError("no decoder process can be started", where="verify", hint=hint) from error
            try:
                while row < task.last:
                    failures += pool.submit(_check, replace(task, first=row, last=row + 1)).result()
                    row += 1
            except BrokenProcessPool:
                failures.append(Failure(task.shard, row, "crashes_decoder"))
                row += 1
    return tuple(failures)


def _started() -> bool:
    return bool(_here)


def _pool(workers: int, setup: _Setup) -> ProcessPoolExecutor:
    return process_pool(workers, _begin, *setup)


def _begin(directory: str, decoder: Callable[[], Decodes], store: storage.Storage) -> None:
    _here[:] = [_Worker(Reader(Manifest.load(directory), wants=("image",), store=store), decoder())]
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # suppresses the decoder's own messages; the result reports the reason


def _check(task: _Task) -> tuple[Failure, ...]:
    reader, decoder = _here[0].reader, _here[0].decoder
    columns = reader.manifest.rows(task.shard).columns
    areas = columns["width"].astype(np.int64) * columns["height"]
    failures: list[Failure] = []
    row = task.first
    while row < task.last:
        within = np.cumsum(areas[row : min(task.last, row + _BATCH)]) <= _BATCH_PIXELS
        last = row + max(int(within.sum()), 1)
        try:
            records = reader.fetch((np.uint64(task.shard) << np.uint64(32)) | np.arange(row, last, dtype=np.uint64))
        except storage.StorageUnavailable:
            raise
        except DataError:
            failures += [Failure(task.shard, bad, "changed_shard") for bad in range(row, task.last)]
            break
        readable = [record for record in records if record.image is not None]
        images = iter(decoder.decode([record.image or b"" for record in readable])) if readable else iter(())
        for number, record in enumerate(records, start=row):
            reason = record.status
            if record.image is not None:
                image = next(images)
                size = None if image is None else tuple(image.shape[:2])
                reason = "undecodable" if size is None else "ok" if size == (record.height, record.width) else "wrong_size"
            if reason != "ok":
                failures.append(Failure(task.shard, number, reason))
        row = last
    return tuple(failures)


# ---- resuming -----------------------------------------------------------------------------------------------------------


def _entry(line: str) -> tuple[_Task, tuple[Failure, ...]]:
    shard, first, last, failures = parse_json(line)
    if not all(type(number) is int for number in (shard, first, last)):
        raise TypeError("a task has three numbers")
    return _Task(shard, first, last), tuple(Failure(shard, int(row), printable(str(reason))) for row, reason in failures)


@dataclass
class _Notebook:
    """Record of completed tasks, one line each; held by one process at a time."""

    path: Path
    fingerprint: str
    failures: dict[_Task, tuple[Failure, ...]] = field(default_factory=dict)
    _file: IO[str] | None = None

    def __enter__(self) -> _Notebook:
        try:
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            what = f"cannot be written ({error.strerror})"
            raise DataError(what, where=str(self.path), hint="Give another --index") from error
        try:
            lock(self._file.fileno(), self.path, wait=False)
        except BlockingIOError:
            self._file.close()
            raise DataError("another verification is running", where=str(self.path), hint="Wait for it, or stop it") from None
        self._file.seek(0)
        text = self._file.read()
        complete = text[: text.rfind("\n") + 1]  # the last line may be incomplete
        lines = complete.splitlines()
        header = json.dumps({"fingerprint": self.fingerprint, "chunk": CHUNK})
        if not lines or lines[0] != header:
            complete, lines = header + "\n", []
        try:
            self.failures.update(map(_entry, lines[1:]))
        except (ValueError, TypeError):  # not written by this class: verify everything again
            self.failures.clear()
            complete = header + "\n"
        if complete != text:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(complete)
            self._file.flush()
        return self

    def add(self, task: _Task, failures: tuple[Failure, ...]) -> None:
        entry = [task.shard, task.first, task.last, [[failure.row, failure.reason] for failure in failures]]
        self._write(json.dumps(entry) + "\n")

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)

    def _write(self, text: str) -> None:
        if self._file is not None:
            self._file.write(text)
            self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
