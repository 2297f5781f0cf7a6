"""Extracts features of a list of samples on all ranks, and gathers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.evaluation.online import Pictures


@dataclass(frozen=True)
class Table:
    """Features of this rank's samples.

    Attributes:
        values: fp32 ``[n, …]`` on the CPU.
        labels: int64 ``[n]``.
        numbers: int64 ``[n]``, the samples' positions in the whole list.
        ids: the samples' numbers in the data set.
    """

    values: Tensor
    labels: Tensor
    numbers: Tensor
    ids: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def of(self, rows: Tensor) -> Table:
        """Select rows."""
        return Table(self.values[rows], self.labels[rows], self.numbers[rows], [self.ids[i] for i in rows.tolist()])


@torch.inference_mode()
def extract(pictures: Pictures, features: Callable[[Tensor], Tensor], *, labelled: bool = True) -> Table:
    """Features of this rank's share; every rank makes the same number of forward passes.

    Args:
        pictures: the images.
        features: maps ``[n, 3, h, w]`` to ``[n, …]``.
        labelled: skip samples without a class number.
    """
    values, labels, numbers, ids, passes = [], [], [], [], 0
    empty = features(pictures.blank()).float().cpu()[:0]
    for shown in pictures.shown():
        passes += 1
        keep = shown.labels >= 0 if labelled else torch.ones_like(shown.labels, dtype=torch.bool)
        rows = keep.nonzero().squeeze(1).tolist()
        if not rows:
            features(pictures.blank())
            continue
        values.append(features(shown.images[keep]).float().cpu())
        labels.append(shown.labels[keep].cpu())
        numbers.append(shown.numbers[keep.cpu()])
        ids += [shown.ids[row] for row in rows]
    for _ in range(pictures.passes - passes):
        features(pictures.blank())
    if not values:
        none = torch.zeros(0, dtype=torch.int64)
        return Table(empty, none, none, [])
    return Table(torch.cat(values), torch.cat(labels), torch.cat(numbers), ids)


def all_gather_table(table: Table, group: dist.ProcessGroup | None) -> Table:
    """Gather all ranks' samples in the order of the list; the result is the same on every rank, whatever the world size."""
    parts = gathered((table.values, table.labels, table.numbers, table.ids), group)
    numbers = torch.cat([part[2] for part in parts])
    order = numbers.argsort()
    ids = [number for part in parts for number in part[3]]
    return Table(
        torch.cat([part[0] for part in parts])[order],
        torch.cat([part[1] for part in parts])[order],
        numbers[order],
        [ids[i] for i in order.tolist()],
    )


def gathered(mine: tuple[Any, ...], group: dist.ProcessGroup | None) -> Sequence[tuple[Any, ...]]:
    """Gather the values of every rank, by rank."""
    parts: list[tuple[Any, ...]] = [()] * dist.get_world_size(group)
    dist.all_gather_object(parts, mine, group=group)
    return parts


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce (sum) in place; host tensors use the host's process group."""
    dist.all_reduce(value, group=group)
    return value
