"""Reads checkpoints: into a running engine with any world size, or the whole student or teacher without an engine."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pipeline.checkpoint.files import Saved, rank_file
from pipeline.checkpoint.fragments import ShardedWeights
from pipeline.checkpoint.manifest import FIXED, UNSHARDED
from pipeline.checkpoint.snapshot import Snapshot, unsharded_tensors
from pipeline.checkpoint.tensor_writer import begins
from pipeline.errors import CheckpointError
from pipeline.methods.base import Method
from pipeline.models.tensor_files import opened
from pipeline.untrusted import open_regular, printable

_FP32 = 4  # bytes
_OPEN_FILES = 64
_ANOTHER = "Resume from another one"


class _Pieces:
    """Reads any range of any saved tensor from the rank files directly into the target memory. Does not mmap, which would cost
    a page fault per page. A file is opened when something in it is needed: of many ranks each needs few.
    """

    def __init__(self, saved: Saved) -> None:
        self._path = saved.path
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._begins: dict[int, dict[str, int]] = {}
        self._where: dict[str, list[tuple[int, int, int]]] = {}
        tables = saved.manifest.get("fragments", [])
        self._ranks = range(len(tables))
        for rank, table in enumerate(tables):
            for name, (start, length) in table.items():
                self._where.setdefault(name, []).append((start, length, rank))

    def close(self) -> None:
        """Closes all files."""
        while self._files:
            self._files.popitem()[1].close()

    def _open(self, rank: int) -> tuple[BinaryIO, dict[str, int]]:
        """A rank's file, and where its tensors begin.

        Raises:
            CheckpointError: it cannot be read.
        """
        file = self._files.get(rank)
        if file is None:
            path = self._path / rank_file(rank)
            try:
                file = self._files[rank] = os.fdopen(open_regular(path, error=CheckpointError), "rb", 0)
                if rank not in self._begins:
                    self._begins[rank] = begins(file)
            except (ValueError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise CheckpointError(
                    f"the header cannot be read ({reason})", where=printable(str(path)), hint=_ANOTHER
                ) from error
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        return file, self._begins[rank]

    def names(self, kind: str) -> set[str]:
        """Names of the tensors of a kind."""
        start = f"{kind}/"
        headers = [self._open(rank)[1] for rank in self._ranks]
        return {key.removeprefix(start) for header in headers for key in header if key.startswith(start)}

    def fill(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """Fills fp32 memory ``[length]`` with a flattened tensor's elements from ``start`` on.

        Raises:
            CheckpointError: the checkpoint lacks some of them.
        """
        if target.device.type != "cpu" or not target.is_contiguous():
            target.copy_(self.read(kind, name, start, target.numel()))
            return
        length = left = target.numel()
        memory = memoryview(target.numpy().data).cast("B")
        for begin, size, rank in self._where.get(name, []):
            low, high = max(begin, start), min(begin + size, start + length)
            if low >= high:
                continue
            file, offsets = self._open(rank)
            offset = offsets.get(f"{kind}/{name}")
            if offset is not None:
                file.seek(offset + _FP32 * (low - begin))
                remaining = memory[_FP32 * (low - start) : _FP32 * (high - start)]
                while remaining and (count := file.readinto(remaining)):  # type: ignore[attr-defined]
                    remaining = remaining[count:]
                left -= high - low - len(remaining) // _FP32
        if left:
            raise CheckpointError(
                f"{left} elements of {kind}/{name} are missing in the checkpoint", where=str(self._path), hint=_ANOTHER
            )

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements ``start`` to ``start + length`` of a flattened tensor, fp32 ``[length]``.

        Raises:
            CheckpointError: as :meth:`fill`, and before allocating more memory than the files hold.
        """
        end = start + length
        ranks = {rank for begin, size, rank in self._where.get(name, []) if begin < end and start < begin + size}
        sizes = (os.fstat(self._open(rank)[0].fileno()).st_size // _FP32 for rank in ranks)
        if length > sum(sizes):
            raise CheckpointError(
                f"{length} elements of {kind}/{name} are missing in the checkpoint", where=str(self._path), hint=_ANOTHER
            )
        out = torch.empty(length, dtype=torch.float32)
        self.fill(out, kind, name, start)
        return out


def load(saved: Saved, engine: ShardedWeights, method: Method) -> None:
    """Restores student, moments, teacher and extra state, with any world size.

    Raises:
        CheckpointError: the checkpoint has another architecture; names the first parameters that differ.
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
            _load_unsharded(saved, method, engine)
        for name, start, piece in engine.teacher_pieces(owned=False):
            pieces.fill(piece, "teacher", name, start)


def _load_unsharded(saved: Saved, method: Method, engine: ShardedWeights) -> None:
    targets = unsharded_tensors(method, engine)
    stored: dict[str, Tensor] = {}
    for path in unsharded_files(saved):
        with opened(path) as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    _compare({k: list(t.shape) for k, t in targets.items()}, {k: list(t.shape) for k, t in stored.items()}, saved.path)
    for name, tensor in stored.items():
        targets[name].detach().copy_(tensor)


def _compare(ours: dict[str, list[int]], theirs: dict[str, list[int]], where: Path) -> None:
    """Refuses tensors whose names or shapes differ from this run's."""
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if different:
        first = different[0]
        saved_shape, own_shape = theirs.get(first, "nothing"), ours.get(first, "nothing")
        raise CheckpointError(
            f"{len(different)} tensors differ, the first is {first}: {saved_shape} in the checkpoint, {own_shape} in this run",
            where=str(where),
            hint="Resume with the config that it was written with, or start a new run",
        )


@dataclass(frozen=True)
class TensorDifference:
    """A tensor whose bits differ from those of a checkpoint.

    Attributes:
        name: its name in the file, such as ``master/backbone.blocks.0.norm1.weight``.
        elements: number of elements compared.
        differing: how many of them differ.
        largest: largest absolute difference; NaN if one of both is not a number.
    """

    name: str
    elements: int
    differing: int
    largest: float


def differing(saved: Saved, snapshot: Snapshot) -> list[TensorDifference]:
    """Compares a rank's part of the current state with a checkpoint of any world size, bit for bit.

    Args:
        saved: the checkpoint.
        snapshot: this rank's part, in the order of the parameters.

    Raises:
        CheckpointError: a tensor is missing in the checkpoint, or has another size.
    """
    differences = []
    with closing(_Pieces(saved)) as pieces:
        for key, tensor in snapshot.pieces.items():
            kind, _, name = key.partition("/")
            start, length = snapshot.table[name]
            differences += _difference(key, tensor, pieces.read(kind, name, start, length))
    unsharded = snapshot.unsharded | snapshot.fixed
    if unsharded:
        for path in unsharded_files(saved):
            with opened(path) as file:
                for key in file.keys():  # noqa: SIM118
                    if key in unsharded:
                        differences += _difference(key, unsharded[key], file.get_tensor(key))
    return differences


def _difference(name: str, ours: Tensor, theirs: Tensor) -> list[TensorDifference]:
    ours, theirs = ours.detach().cpu().reshape(-1), theirs.reshape(-1)
    if (ours.dtype, len(ours)) != (theirs.dtype, len(theirs)):
        return [TensorDifference(name, len(ours), len(ours), math.nan)]
    if len(ours) == 0 or torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)):
        return []
    unequal = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    largest = float((ours.double() - theirs.double()).abs().max())
    return [TensorDifference(name, len(ours), int(unequal.sum()), largest)]


def read_teacher(saved: Saved) -> Iterator[tuple[str, Tensor]]:
    """Reads the whole teacher from a checkpoint, without an engine: names as in the method, fp32."""
    return _read_unsharded(saved, "teacher", "teacher")


def read_student(saved: Saved) -> Iterator[tuple[str, Tensor]]:
    """Reads the whole student without an engine: fp32 master weights and frozen parameters, names as in the method."""
    return _read_unsharded(saved, "master", "frozen")


def _read_unsharded(saved: Saved, sharded: str, unsharded: str) -> Iterator[tuple[str, Tensor]]:
    with closing(_Pieces(saved)) as pieces:
        names = pieces.names(sharded)
        for name, shape in saved.manifest.get("shapes", {}).items():
            if name in names:
                yield name, pieces.read(sharded, name, 0, math.prod(shape)).view(shape)
    for path in unsharded_files(saved):
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118
                if key.startswith(f"{unsharded}/"):
                    yield key.removeprefix(f"{unsharded}/"), file.get_tensor(key)


def unsharded_files(saved: Saved) -> list[Path]:
    """The files of tensors that are the same on all ranks: those that change, and, if the manifest lists it, the others."""
    listed = {file["name"] for file in saved.manifest["files"]}
    return [saved.path / name for name in (UNSHARDED, FIXED) if name == UNSHARDED or name in listed]
