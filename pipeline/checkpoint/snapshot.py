"""Snapshot of what a rank saves, copied to host memory so that training can continue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.checkpoint.fragments import ShardedWeights
from pipeline.methods.base import Method


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint.

    Attributes:
        pieces: master/<name>, exp_avg/<name>, exp_avg_sq/<name> and teacher/<name>, fp32 ``[elements]``.
        table: first element and number of elements of each parameter's fragment.
        unsharded: the tensors that are the same on all ranks, on the one that writes them (once, or once on each node); empty on
            others.
        fixed: of these, those that never change in the run (``Method.constant_names``); empty if they are not requested.
    """

    pieces: dict[str, Tensor]
    table: dict[str, list[int]]
    unsharded: dict[str, Tensor]
    fixed: dict[str, Tensor]


class Staging:
    """Takes snapshots into host memory that is reused, since allocating it takes longer than filling it.

    A copied snapshot is therefore valid only until the next is taken.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, engine: ShardedWeights, method: Method, *, unsharded: bool, copy: bool, fixed: bool = True) -> Snapshot:
        """Takes this rank's part of a checkpoint of the current state; collective over all ranks.

        Args:
            engine: provides the fragments.
            method: provides teacher, extra state and frozen parameters.
            unsharded: whether this rank takes the tensors that are the same on all ranks.
            copy: copy to host memory. Otherwise the pieces are the live tensors, and training must wait until they are
                written.
            fixed: include the tensors that never change.
        """
        pieces: dict[str, Tensor] = {}
        table: dict[str, list[int]] = {}
        for f in engine.fragments():
            table[f.name] = [f.start, f.master.numel()]
            pieces[f"master/{f.name}"] = f.master
            pieces.update({f"{moment}/{f.name}": tensor for moment, tensor in f.moments.items()})
        for name, _, piece in engine.teacher_pieces(owned=True):
            pieces[f"teacher/{name}"] = piece
        with engine.gathered():
            # ZeRO stage 3 shards whole tensors again at the end of this block, so they are always copied.
            tensors = unsharded_tensors(method, engine) if unsharded else {}
            constant = {name: t for name, t in tensors.items() if name.partition("/")[2] in method.constant_names}
            common = self._copied({name: t for name, t in tensors.items() if name not in constant}, "whole")
            once = {name: t.detach().to("cpu", copy=True) for name, t in constant.items()} if fixed else {}
        return Snapshot(self._copied(pieces, "piece") if copy else pieces, table, common, once)

    def _copied(self, tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            host = self._kept.get(f"{kind} {name}")
            if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
                host = self._kept[f"{kind} {name}"] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
                )
            copies[name] = host.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return copies


def unsharded_tensors(method: Method, engine: ShardedWeights) -> dict[str, Tensor]:
    """The tensors of everything without fragments, by their names in the file; not copied."""
    tensors = {f"memory/{name}": tensor for name, tensor in method.extra_state.items()}
    trainable = engine.shapes
    frozen = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    tensors.update({f"frozen/{name}": t for name, t in frozen.items() if name not in trainable})
    if method.teacher is not None:
        rest = method.teacher.state_dict()
        tensors.update({f"teacher/{name}": t for name, t in rest.items() if name not in trainable})
    return tensors
