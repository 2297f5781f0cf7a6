"""Extracts features of a list of samples on all ranks, and gathers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.evaluation.images import ImageSet


@dataclass(frozen=True)
class FeatureTable:
    """Features of this rank's samples.

    Attributes:
        values: fp32 ``[n, …]`` on the CPU.
        labels: int64 ``[n]``.
        positions: int64 ``[n]``, the samples' positions in the whole list.
        ids: the samples' numbers in the data set.
    """

    values: Tensor
    labels: Tensor
    positions: Tensor
    ids: list[int]

    def __len__(self) -> int:
        return len(self.positions)

    def select(self, rows: Tensor) -> FeatureTable:
        """Select rows."""
        return FeatureTable(self.values[rows], self.labels[rows], self.positions[rows], [self.ids[i] for i in rows.tolist()])


@torch.inference_mode()
def extract(images: ImageSet, features: Callable[[Tensor], Tensor], *, labelled: bool = True) -> FeatureTable:
    """Features of this rank's share; every rank makes the same number of forward passes.

    Args:
        images: the images.
        features: maps ``[n, 3, h, w]`` to ``[n, …]``.
        labelled: skip samples without a class number.
    """
    values, labels, positions, ids, passes = [], [], [], [], 0
    empty = features(images.blank()).float().cpu()[:0]
    for batch in images:
        passes += 1
        keep = batch.labels >= 0 if labelled else torch.ones_like(batch.labels, dtype=torch.bool)
        rows = keep.nonzero().squeeze(1).tolist()
        if not rows:
            features(images.blank())
            continue
        values.append(features(batch.images[keep]).float().cpu())
        labels.append(batch.labels[keep].cpu())
        positions.append(batch.positions[keep.cpu()])
        ids += [batch.ids[row] for row in rows]
    for _ in range(images.passes - passes):
        features(images.blank())
    if not values:
        none = torch.zeros(0, dtype=torch.int64)
        return FeatureTable(empty, none, none, [])
    return FeatureTable(torch.cat(values), torch.cat(labels), torch.cat(positions), ids)


def all_gather_table(table: FeatureTable, group: dist.ProcessGroup | None) -> FeatureTable:
    """Gather all ranks' samples in the order of the list; the result is the same on every rank, whatever the world size."""
    parts = all_gather((table.values, table.labels, table.positions, table.ids), group)
    positions = torch.cat([part[2] for part in parts])
    order = positions.argsort()
    ids = [sample for part in parts for sample in part[3]]
    return FeatureTable(
        torch.cat([part[0] for part in parts])[order],
        torch.cat([part[1] for part in parts])[order],
        positions[order],
        [ids[i] for i in order.tolist()],
    )


def all_gather(values: tuple[Any, ...], group: dist.ProcessGroup | None) -> Sequence[tuple[Any, ...]]:
    """Gather the values of every rank, by rank."""
    parts: list[tuple[Any, ...]] = [()] * dist.get_world_size(group)
    dist.all_gather_object(parts, values, group=group)
    return parts


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce (sum) in place; host tensors use the host's process group."""
    dist.all_reduce(value, group=group)
    return value
