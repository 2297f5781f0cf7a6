"""What the data sets and loaders of the library share: ranks, positions, states."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, DataError

State = dict[str, Any]


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among those that share the data.

    Attributes:
        rank: from 0.
        world: number of ranks.
        local_world: ranks on this node, which share its cache.
    """

    rank: int = 0
    world: int = 1
    local_world: int = 1

    @classmethod
    def find(cls, rank: int | None, world_size: int | None) -> Ranks:
        """Returns the rank as passed, else of ``torch.distributed`` if it is initialized, else of ``RANK`` and ``WORLD_SIZE``.

        Raises:
            ConfigError: only one of the two is passed or set, or they are no numbers.
        """
        local = os.environ.get("LOCAL_WORLD_SIZE", "1")
        local_world = int(local) if local.isdigit() and int(local) > 0 else 1
        if (rank is None) != (world_size is None):
            raise ConfigError("one of rank and world_size is missing", where="ShardDataset", hint="Give both, or neither")
        if rank is not None and world_size is not None:
            return cls(rank, world_size, min(local_world, max(world_size, 1)))
        dist = sys.modules.get("torch.distributed")
        if dist is not None and dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), local_world)
        named = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
        if named[0] is None:
            return cls()
        if named[1] is None or not all(text is not None and text.isdigit() for text in named):
            raise ConfigError(
                f"RANK is {named[0]!r} and WORLD_SIZE is {named[1]!r}",
                where="environment",
                hint="Set both to numbers, as torchrun does, or pass rank and world_size",
            )
        return cls(int(named[0]), int(named[1]), local_world)


@dataclass(frozen=True)
class Units:
    """How the ranks' samples of a step are cut into batches, and how positions and batches belong together.

    A *unit* is one batch of every rank: the first unit of a step has the first ``batch`` samples of each rank's part.

    Attributes:
        global_batch: samples of a step.
        world: number of ranks.
        batch: samples of a batch on one rank; divides the rank's part of a step.
    """

    global_batch: int
    world: int
    batch: int

    @classmethod
    def of(cls, global_batch: int, world: int, batch: int | None) -> Units:
        """Checks the sizes; without ``batch`` it is the rank's part of a step.

        Raises:
            ConfigError: they do not divide.
        """
        share = global_batch // world
        if batch is not None and (batch < 1 or share % batch):
            raise ConfigError(
                f"batches of {batch} samples do not divide the {share} samples that a rank has of a step",
                where="batch_size",
                hint=f"Choose a divisor of {share}: global_batch_size is {global_batch}, on {world} ranks",
            )
        return cls(global_batch, world, batch or share)

    @property
    def per_step(self) -> int:
        """Units of a step."""
        return self.global_batch // (self.world * self.batch)

    def position(self, unit: int, taken: int = 0) -> int:
        """Returns the samples before a unit, over all ranks; and ``taken`` of it on each."""
        return (unit * self.batch + taken) * self.world

    def at(self, position: int) -> tuple[int, int]:
        """Returns the unit at a position, and how many of its samples each rank has had.

        Raises:
            DataError: the position lies within a step, where ranks of this number cannot continue.
        """
        within = position % self.global_batch
        if within % self.world:
            raise DataError(
                f"position {position} lies within a step of {self.global_batch} samples; {self.world} ranks cannot continue it",
                where="samples",
                hint="Use as many ranks as before, or save after complete steps",
            )
        return divmod(position // self.world, self.batch)


def check_state(state: Any, identity: str) -> int:
    """Returns the position in a state: of a data set, of a loader, or of a StatefulDataLoader around a data set.

    Raises:
        DataError: it is no such state, or belongs to other data or another order.
    """
    states = list(_states(state))
    if not states:
        raise DataError(
            "is not a state of this loader",
            where="load_state_dict",
            hint="Pass what state_dict() of a data set or a loader returned",
        )
    for one in states:
        if one["order"] != identity:
            raise DataError(
                f"the state belongs to the order {one['order']!r}, this is {identity!r}: other shards, seed, global_batch_size, "
                "canonical_streams, shuffle_block_size or sources",
                where="load_state_dict",
                hint="Use those of the run that was saved, or start at its position with seek()",
            )
    if isinstance(state, Mapping) and state.get("_steps_since_snapshot"):
        raise DataError(
            "the state of the StatefulDataLoader is older than its last batch",
            where="load_state_dict",
            hint="Leave snapshot_every_n_steps at 1",
        )
    # Workers take turns, so the first sample that none has had is that of the worker which is least far.
    return min(int(one["samples"]) for one in states)


def _states(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    if not isinstance(value, Mapping) or depth > 8:
        return
    samples = value.get("samples")
    if type(samples) is int and 0 <= samples < 1 << 62 and isinstance(value.get("order"), str):
        yield value
        return
    for inner in value.values():
        yield from _states(inner, depth + 1)
