"""Loads a checkpoint into its method, without an engine, for evaluation, export and visualization."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint import files, selection
from pipeline.checkpoint.files import Saved
from pipeline.checkpoint.manifest import MANIFEST
from pipeline.checkpoint.reader import read_student, read_teacher
from pipeline.checkpoint.retention import read_best
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError
from pipeline.masking import shown
from pipeline.methods.base import Method
from pipeline.methods.registry import build_seeded_method
from pipeline.runtime.run_directory import RunDirectory


def newest(run: Path) -> Saved:
    """The newest complete checkpoint of a run; reports damaged newer ones on stderr.

    Raises:
        CheckpointError: there is none.
    """
    checkpoint, complaints = selection.newest(RunDirectory(run).checkpoints)
    for complaint in complaints:
        print(shown(complaint), file=sys.stderr)
    if checkpoint is None:
        raise CheckpointError(
            "the run has no checkpoint yet",
            where=str(RunDirectory(run).checkpoints),
            hint="Train until the first checkpoint (checkpoint.every), or name another run",
        )
    return checkpoint


def named_or_newest(run: Path, checkpoint: Path | None) -> Saved:
    """The given checkpoint after verification, or else the run's newest.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if checkpoint is None:
        return newest(run)
    saved = files.read(checkpoint)
    files.verify(saved)
    return saved


def fill_trained(method: Method, saved: Saved, *, student: bool = False) -> None:
    """Loads a checkpoint's weights into a method, strictly: the teacher's, and the student's where the method exports those.

    Args:
        method: the method, before an engine wraps it.
        saved: the checkpoint.
        student: load the student's weights, whatever the method exports.

    Raises:
        CheckpointError: names or shapes differ.
    """
    exported = {id(p) for module in method.export().values() for p in module.parameters()}
    own = dict(method.named_parameters())
    trainable = {name for name, p in own.items() if p.requires_grad}
    if method.teacher is not None:
        _fitting(dict(method.teacher.named_parameters()), trainable, saved, "teacher's")
        method.teacher.load_state_dict(dict(read_teacher(saved)))
    if student or any(id(p) in exported for p in own.values()):
        _fitting(own, trainable, saved, "student's")
        tensors = {**own, **dict(method.named_buffers())}
        with torch.no_grad():
            for name, tensor in read_student(saved):
                tensors[name].copy_(tensor)


def _fitting(own: Mapping[str, Tensor], trainable: set[str], saved: Saved, whose: str) -> None:
    """Checks shapes first, so that a checkpoint of a larger network is refused before its gigabytes are read."""
    ours = {name: list(tensor.shape) for name, tensor in own.items() if name in trainable}
    theirs = {name: shape for name, shape in saved.manifest.get("shapes", {}).items() if name in ours}
    wrong = [name for name in ours if name in theirs and theirs[name] != ours[name]] or sorted(ours.keys() - theirs.keys())
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{len(wrong)} of the {whose} weights do not match, the first is {first}: "
            f"{theirs.get(first, 'absent')} in the checkpoint, {ours[first]} in the settings",
            where=str(saved.path),
            hint="Use the settings of the run: leave model.* and method.* as they are",
        )


def load_trained(config: Config, saved: Saved, device: torch.device) -> Method:
    """Builds the method with a checkpoint's networks for evaluation; a student that is not evaluated keeps its initial weights.

    Args:
        config: the run's configuration.
        saved: the checkpoint.
        device: device of the networks.

    Raises:
        CheckpointError: the checkpoint holds another architecture.
    """
    method = build_seeded_method(config, device)
    fill_trained(method, saved)
    return method


def chosen(path: Path, *, best: bool = False) -> Saved:
    """The checkpoint at a path: the path itself, or a run's newest or best.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).exists():
        return files.read(path)
    if not best:
        return newest(path)
    folder = path / "checkpoints"
    best_checkpoint = read_best(folder)
    if "checkpoint" not in best_checkpoint:
        raise CheckpointError("the run has no best checkpoint", where=str(folder), hint="Leave --best out")
    return files.read(folder / str(best_checkpoint["checkpoint"]))
