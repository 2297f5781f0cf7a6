"""Takes the signature of each step: digests of samples and inputs, exact loss terms, gradient norms and schedules.

A GPU computes its part behind the step, a few sums over the batch, and copies it to the host in the background; it is read once
it has arrived, at the latest with the next log line, so that the host never waits for it. Nothing is communicated.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.runtime.process_group import World
from pipeline.training.signature_file import Header, Signature, SignatureFile, Weights, sketched

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = 0x9E3779B97F4A7C15  # odd; multiples of it modulo 2**64 are spread evenly
_APART = 1 << 16  # weights between two views of a kind


@dataclass
class Taken:
    """A step's signature whose numbers may still be computed by the device.

    Attributes:
        step: the step's number.
        ids: numbers of this rank's samples.
        names: of the values, which follow the samples' digests in ``numbers``.
        schedules: as in :class:`Signature`.
        numbers: int64 ``[samples + values]`` on the host.
        ready: recorded behind the copy; ``None`` on a CPU.
        applied: whether the step was applied, once it is known.
    """

    step: int
    ids: list[int]
    names: list[str]
    schedules: tuple[float, ...]
    numbers: Tensor
    ready: torch.cuda.Event | None
    applied: bool = False


class Signatures:
    """Takes the signatures of one rank and writes them.

    Args:
        file: where to.
        world: this rank's position in the process group.
    """

    def __init__(self, file: SignatureFile, world: World) -> None:
        self.file, self.world = file, world
        self._settled: deque[Taken] = deque()

    def take(self, step: Step, batches: Sequence[Batch], terms: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> Taken:
        """Queues what the signature of a step needs on the device; does not wait for it.

        Args:
            step: the step's number and schedules.
            batches: this rank's micro-batches.
            terms: loss terms, fp32 scalars.
            norms: gradient norm of each network, fp32 scalars; the same on all ranks.
        """
        values = {f"term/{name}": term for name, term in terms.items()}
        schedules: tuple[float, ...] = ()
        if self.world.rank == 0:
            values |= {f"norm/{name}": norm for name, norm in norms.items()}
            schedules = (step.lr, step.last_layer_lr, step.weight_decay, step.momentum, step.teacher_temperature)
        bits = torch.stack(list(values.values())).view(torch.int32).long()
        numbers = torch.cat([*map(sample_digests, batches), bits])
        ready = None
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        ids = [number for batch in batches for number in batch.ids]
        return Taken(step.index, ids, list(values), schedules, numbers, ready)

    def settle(self, taken: Taken, *, applied: bool, wait: bool = False) -> None:
        """Writes the signature of a step, or keeps it until its numbers have arrived.

        Args:
            taken: of a step that is not forgotten after a rollback.
            applied: whether the step was applied.
            wait: wait for this and all earlier ones, where the host waits anyway.
        """
        taken.applied = applied
        self._settled.append(taken)
        if wait and taken.ready is not None and not taken.ready.query():
            taken.ready.synchronize()
        self._write()

    def weights(self, step: int, digests: Mapping[str, str]) -> None:
        """Writes the digests of this rank's part of a checkpoint."""
        self.file.weights(Weights(step, digests))

    def close(self) -> None:
        """Writes what has arrived and closes the file; does not wait."""
        with contextlib.suppress(RuntimeError):  # of a device that failed, which has been reported
            self._write()
        self.file.close()

    def _write(self) -> None:
        while self._settled and ((ready := self._settled[0].ready) is None or ready.query()):
            self.file.step(signature_of(self._settled.popleft(), self.world.rank))


def signature_of(taken: Taken, rank: int) -> Signature:
    """The signature of a step whose numbers have arrived."""
    numbers, count = taken.numbers.numpy(), len(taken.ids)
    positions = np.arange(rank * count, (rank + 1) * count, dtype=np.uint64)
    samples = _hashed(np.asarray(taken.ids, dtype=np.uint64), positions)
    inputs = _hashed(numbers[:count].view(np.uint64), positions)
    floats = numbers[count:].astype(np.int32).view(np.float32).tolist()
    return Signature(
        taken.step,
        taken.applied,
        int(samples.sum()),
        int(inputs.sum()),
        _sketches(samples ^ inputs),
        dict(zip(taken.names, floats, strict=True)),
        taken.schedules,
    )


def _sketches(hashes: NDArray[np.uint64]) -> bytes:
    if not len(hashes):
        return b""
    return (
        np.bitwise_xor.reduceat(hashes >> np.uint64(56), [part.start for part in sketched(len(hashes))])
        .astype(np.uint8)
        .tobytes()
    )


def _hashed(numbers: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of each number and its position (the finalizer of splitmix64)."""
    state = numbers ^ (positions + np.uint64(1)) * np.uint64(_GOLDEN)
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)


def sample_digests(batch: Batch) -> Tensor:
    """A digest of each sample's views, tokens and masks, from their exact bits: int64 ``[samples]`` on the batch's device.

    Sums of integers, so that they are the same on any device and in any order of summation. Columns are weighted, so that a
    flipped or shifted view has another digest.
    """
    kinds = [torch.stack([_columns(view) for view in views]) for views in batch.views.values() if views]
    count = kinds[0].shape[1]
    kinds += [masks.grid.view(-1, count, masks.grid.shape[-1]).long() for masks in batch.masks.values()]
    if batch.tokens is not None:
        kinds.append(batch.tokens[None].long())
    parts = [(kind * _weights(*kind.shape[::2], number, kind.device)).sum((0, 2)) for number, kind in enumerate(kinds)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _columns(view: Tensor) -> Tensor:
    """Sums over all but the first and the last axis of a view's bits as integers: int64 ``[samples, columns]``. A column is as
    many elements as make eight bytes, which are added fastest, or a single one where a row is not a multiple of that.
    """
    if view.is_contiguous() and view.shape[-1] * view.element_size() % 8 == 0:
        bits = view.view(torch.int64)
    else:
        bits = view.view(_INTEGERS[view.element_size()])
    return bits.flatten(1, -2).sum(1, dtype=torch.int64) if bits.dim() > 2 else bits.long()


@cache
def _weights(views: int, width: int, kind: int, device: torch.device) -> Tensor:
    """Odd weights of the columns of views of one kind: int64 ``[views, 1, width]``."""
    columns = torch.arange(width, device=device) + (kind << 32)  # computed there: a copy would have to be waited for
    rows = torch.arange(views, device=device)[:, None, None] * _APART
    return (rows + columns) * (_GOLDEN - (1 << 64)) | 1


def header_of(world: World, attempt: int, *, zero_stage: int, micro_batch: int, fovea: str) -> Header:
    """The header of this rank's signatures."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    return Header(
        attempt=attempt,
        rank=world.rank,
        world=world.size,
        device=device,
        threads=torch.get_num_threads(),
        zero_stage=zero_stage,
        micro_batch=micro_batch,
        torch=torch.__version__,
        fovea=fovea,
        code=code_digest(),
    )


@cache
def code_digest() -> str:
    """Digest of fovea's source files, in hexadecimal."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
