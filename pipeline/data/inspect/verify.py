"""Verifies a data set by decoding every accepted sample, in worker processes.

An image that crashes the decoder ends one process only: the samples being decoded are tried again one by one to find the one at
fault. An interrupted verification continues where it stopped, see :mod:`pipeline.data.inspect.verify_record`. Memory is bounded
by the number of shards and of failures.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.data import storage
from pipeline.data.index.fields import STATUSES
from pipeline.data.index.manifest import Manifest
from pipeline.data.index.shard_table import Shard, ShardTable
from pipeline.data.inspect.verify_record import CHUNK, Failure, Record, Task
from pipeline.data.loader.reader import Reader
from pipeline.errors import DataError
from pipeline.runtime.locks import lock
from pipeline.runtime.process_pool import process_pool

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


@dataclass
class _Worker:
    reader: Reader
    decoder: Decodes


_Setup = tuple[str, Callable[[], Decodes] | None, storage.Storage]
_here: list[_Worker] = []  # the worker of this process


def cpu_decoder(manifest: Manifest) -> Decodes:
    """Returns the decoder used in training, with one CPU thread."""
    from pipeline.data.augment.decode import decoder_of

    return decoder_of(manifest.fields)


def verify(
    manifest: Manifest,
    *,
    workers: int | None = None,
    decoder: Callable[[], Decodes] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    store: storage.Storage | None = None,
    part: tuple[int, int] | None = None,
) -> Verification:
    """Reads and decodes every accepted sample, and compares checksum and size with the index.

    Args:
        manifest: a saved manifest: processes read it from its directory.
        workers: processes; None: as many as there are processors and tasks for them.
        decoder: creates the decoder in each process, a function of a module; by default that of training.
        progress: called with (samples done, total samples, a line after the last sample of a shard).
        store: access to the shards.
        part: number, from 1, and count of parts: only every ``count``-th shard is verified here, and a verification of everything
            takes over the result.

    Raises:
        DataError: another verification of this index is running, or the index cannot be read.
    """
    number, count = part or (1, 1)
    sizes = manifest.sizes[number - 1 :: count]
    total, tasks_in_all = int(sizes.sum()), int((-(-sizes // CHUNK)).sum())
    with Record(Path(manifest.directory), manifest.fingerprint, manifest.sizes, part) as record:
        resumed = record.checked
        failed = Counter(failure.shard for failure in record.failures)
        left: dict[int, int] = {}  # tasks of the shards that are being verified

        def tasks() -> Iterator[Task]:
            for shard in range(number - 1, len(manifest.shards), count):
                samples = int(manifest.sizes[shard])
                every = (Task(shard, first, min(first + CHUNK, samples)) for first in range(0, samples, CHUNK))
                open_tasks = [task for task in every if not record.is_done(task)]
                if open_tasks:
                    left[shard] = len(open_tasks)
                yield from open_tasks

        workers = max(1, min(workers or len(os.sched_getaffinity(0)), tasks_in_all))
        for task, failures in _run(tasks(), workers, (manifest.directory, decoder, store or storage.Storage())):
            record.add(task, failures)
            left[task.shard] -= 1
            failed[task.shard] += len(failures)
            line = ""
            if not left[task.shard]:
                shard = manifest.shards[task.shard]
                line = f"{shard.name}: {shard.samples} samples, {failed[task.shard]} failed"
                del left[task.shard], failed[task.shard]
            if progress is not None:
                progress(record.checked, total, line)
        record.finish()
        return Verification(record.checked, tuple(sorted(record.failures, key=lambda f: (f.shard, f.row))), resumed)


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


def _run(tasks: Iterator[Task], workers: int, setup: _Setup) -> Iterator[tuple[Task, tuple[Failure, ...]]]:
    """Yields each task with its failures, in the order of completion."""
    following = next(tasks, None)
    while following is not None:
        flying: dict[Future[tuple[Failure, ...]], Task] = {}
        with _pool(workers, setup) as pool:
            try:
                while following is not None or flying:
                    # Limits the queue: after a crash, every submitted task is a suspect.
                    while following is not None and len(flying) < 2 * workers:
                        flying[pool.submit(_check, following)] = following
                        following = next(tasks, None)
                    wait(flying, return_when=FIRST_COMPLETED)
                    for job in [job for job in flying if job.done()]:  # in the order of the tasks
                        result = job.result()
                        yield flying.pop(job), result
            except BrokenProcessPool:
                pass
        for job, task in flying.items():
            yield task, job.result() if job.done() and job.exception() is None else _carefully(task, setup)


def _carefully(task: Task, setup: _Setup) -> tuple[Failure, ...]:
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


def _begin(directory: str, decoder: Callable[[], Decodes] | None, store: storage.Storage) -> None:
    manifest = Manifest.load(directory)
    _here[:] = [_Worker(Reader(manifest, wants=("image",), store=store), cpu_decoder(manifest) if decoder is None else decoder())]
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # suppresses the decoder's own messages; the result reports the reason


def _check(task: Task) -> tuple[Failure, ...]:
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
