"""Checkpoints that are whole or not there.

Layout, one directory a checkpoint, below ``<run>/checkpoints``::

    step_000000120/
      rank_00000.safetensors   a rank's fragments: master/<name>, exp_avg/<name>, exp_avg_sq/<name>, teacher/<name>, fp32, 1-D
      rank_00001.safetensors   …
      whole.safetensors        what is the same on all ranks: memory/<name>, frozen/<name>, teacher/<buffer name>
      manifest.json            written last: counters, data state, config, fragment table, and size and checksum of every file

A checkpoint is written to ``.tmp-step_…``, every file synced, and becomes current by one rename; it is pruned by another rename
back to such a name, then deleted. A directory of that name is rubbish and is swept away by the next save. Fragments carry their
place in the whole parameter, so any number of ranks can read what any other number wrote.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.recipes.base import Recipe
from pipeline.training.engine import Engine
from pipeline.training.saved import FORMAT, MANIFEST, Saved, entry, listed

_WHOLE = "whole.safetensors"
_TEMPORARY = ".tmp-"


def _sync(path: Path) -> None:
    """Force a file or a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A file of tensors, on disk; its line in the manifest."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    _sync(path)
    return entry(path)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: ``<run>/checkpoints``.
        keep_last: how many are kept, but never fewer than two: the newest may turn out to be damaged.
        group: a gloo group for agreement between ranks, ``None`` for the default group.
    """

    def __init__(self, directory: Path, *, keep_last: int = 3, group: dist.ProcessGroup | None = None) -> None:
        self.directory, self._keep, self._group = directory, max(keep_last, 2), group

    def save(self, engine: Engine, recipe: Recipe, facts: dict[str, Any]) -> Path:
        """Write a checkpoint with all ranks and make it current.

        Args:
            engine: whose fragments to write.
            recipe: whose teacher, memory and frozen parameters to write.
            facts: what goes into the manifest; must hold ``step``.

        Raises:
            CheckpointError: on all ranks, if any rank could not write; the checkpoints before are untouched.
        """
        name = f"step_{facts['step']:09d}"
        temporary, final = self.directory / f"{_TEMPORARY}{name}", self.directory / name
        rank = dist.get_rank()
        with engine.gathered():
            whole = _whole(recipe, engine) if rank == 0 else {}
            whole = {name: tensor.detach().clone() for name, tensor in whole.items()}
        self._agree(lambda: self._prepare(temporary) if rank == 0 else None, temporary)
        tables = self._agree(lambda: _write_rank(temporary, rank, engine), temporary)
        self._agree(lambda: self._commit(temporary, final, whole, engine, facts, tables) if rank == 0 else None, temporary)
        return final

    def _prepare(self, temporary: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for stale in self.directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(stale)
        temporary.mkdir()

    def _commit(
        self, temporary: Path, final: Path, whole: dict[str, Tensor], engine: Engine, facts: dict[str, Any], tables: list[Any]
    ) -> None:
        rest = _write(temporary / _WHOLE, whole)
        manifest = {
            "format": FORMAT,
            **facts,
            "world": len(tables),
            "shapes": {name: list(shape) for name, shape in engine.shapes.items()},
            "fragments": [table["fragments"] for table in tables],
            "files": [*(table["file"] for table in tables), rest],
        }
        with (temporary / MANIFEST).open("w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary)
        if final.exists():  # an earlier attempt came as far, and its checkpoint was damaged since
            self._discard(final)
        temporary.rename(final)
        _sync(self.directory)
        for old in listed(self.directory)[: -self._keep]:
            self._discard(old.path)

    def _discard(self, path: Path) -> None:
        rubbish = self.directory / f"{_TEMPORARY}old-{path.name}"
        path.rename(rubbish)
        shutil.rmtree(rubbish, ignore_errors=True)  # what cannot be deleted now is swept away by the next save

    def _agree(self, action: Callable[[], Any], where: Path) -> list[Any]:
        """Run the action here, then learn how it went everywhere; all ranks raise if one failed."""
        result: Any = None
        failure = ""
        try:
            result = action()
        except (OSError, SafetensorError) as error:
            failure = f"rank {dist.get_rank()}: {error}"
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, (failure, result), group=self._group)
        failures = [f for f, _ in results if f]
        if failures:
            raise CheckpointError(
                f"the checkpoint could not be written ({failures[0]})",
                where=str(where),
                mend="free space or mend the directory; the last good checkpoint is untouched and the run resumes from it",
            )
        return [r for _, r in results]


def _write_rank(directory: Path, rank: int, engine: Engine) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    table: dict[str, list[int]] = {}
    for f in engine.fragments():
        table[f.name] = [f.start, f.master.numel()]
        tensors[f"master/{f.name}"] = f.master
        tensors.update({f"{moment}/{f.name}": tensor for moment, tensor in f.moments.items()})
    for name, _, piece in engine.teacher_pieces(owned=True):
        tensors[f"teacher/{name}"] = piece
    return {"file": _write(directory / _rank_file(rank), tensors), "fragments": table}


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _whole(recipe: Recipe, engine: Engine) -> dict[str, Tensor]:
    """The tensors themselves, by their names in the file, of everything that has no fragments."""
    tensors = {f"memory/{name}": tensor for name, tensor in recipe.memory.items()}
    trainable = engine.shapes
    frozen = {**dict(recipe.named_parameters()), **dict(recipe.named_buffers())}
    tensors.update({f"frozen/{name}": t for name, t in frozen.items() if name not in trainable})
    if recipe.teacher is not None:
        rest = recipe.teacher.state_dict()
        tensors.update({f"teacher/{name}": t for name, t in rest.items() if name not in trainable})
    return tensors


class _Pieces:
    """Reads any range of any saved tensor out of the rank files."""

    def __init__(self, saved: Saved) -> None:
        ranks = range(len(saved.manifest["fragments"]))
        self._path, self._files = saved.path, [safe_open(saved.path / _rank_file(rank), framework="pt") for rank in ranks]
        self._where: dict[str, list[tuple[int, int, int]]] = {}
        for rank, table in enumerate(saved.manifest["fragments"]):
            for name, (start, length) in table.items():
                self._where.setdefault(name, []).append((start, length, rank))

    def names(self, kind: str) -> set[str]:
        """Which tensors there are of a kind."""
        start = f"{kind}/"
        return {key.removeprefix(start) for file in self._files for key in file.keys() if key.startswith(start)}  # noqa: SIM118

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements ``start`` to ``start + length`` of a flattened tensor, fp32 ``[length]``."""
        out = torch.empty(length, dtype=torch.float32)
        done = 0
        for begin, size, rank in self._where.get(name, []):
            low, high = max(begin, start), min(begin + size, start + length)
            if low < high:
                out[low - start : high - start] = self._files[rank].get_slice(f"{kind}/{name}")[low - begin : high - begin]
                done += high - low
        if done != length:
            raise CheckpointError(
                f"{length - done} elements of {kind}/{name} are not in it", where=str(self._path), mend="resume from another one"
            )
        return out


def load(saved: Saved, engine: Engine, recipe: Recipe) -> None:
    """Bring student, moments, teacher and memory to what they were, on any number of ranks.

    Raises:
        CheckpointError: the checkpoint is of another architecture; the first parameters that differ are named.
    """
    ours = {name: list(shape) for name, shape in engine.shapes.items()}
    _compare(ours, saved.manifest["shapes"], saved.path)
    pieces = _Pieces(saved)
    for f in engine.held():
        f.master.copy_(pieces.read("master", f.name, f.start, f.master.numel()))
        for moment, tensor in f.moments.items():
            tensor.copy_(pieces.read(moment, f.name, f.start, f.master.numel()))
    engine.set_optimizer_steps(int(saved.manifest["applied"]))
    engine.refresh()
    with engine.gathered(write=True):
        _load_whole(saved, recipe, engine)
    for name, start, piece in engine.teacher_pieces(owned=False):
        piece.copy_(pieces.read("teacher", name, start, piece.numel()))


def _load_whole(saved: Saved, recipe: Recipe, engine: Engine) -> None:
    targets = _whole(recipe, engine)
    with safe_open(saved.path / _WHOLE, framework="pt") as file:
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
            mend="resume with the config it was written with, or start a new run",
        )


def read_teacher(saved: Saved) -> Iterator[tuple[str, Tensor]]:
    """The whole teacher out of a checkpoint, without an engine: names as in the recipe, fp32."""
    pieces = _Pieces(saved)
    sharded = pieces.names("teacher")
    for name, shape in saved.manifest["shapes"].items():
        if name in sharded:
            yield name, pieces.read("teacher", name, 0, math.prod(shape)).view(shape)
    with safe_open(saved.path / _WHOLE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.startswith("teacher/"):
                yield key.removeprefix("teacher/"), file.get_tensor(key)
