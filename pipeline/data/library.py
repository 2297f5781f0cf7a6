"""What the data sets and loaders of the library share: ranks, positions, states."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, DataError
from pipeline.masking import printable

State = dict[str, Any]
_MOST = (1 << 63) - 1


def integer(name: str, value: Any, least: int = 0) -> int:
    """An argument that must be an integer below 2⁶³, of Python or NumPy.

    Args:
        name: of the argument.
        value: as it was given.
        least: smallest value.

    Raises:
        ConfigError: it is none, or too small or large.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= _MOST:
        raise ConfigError(f"{printable(repr(value), limit=60)} is not an integer from {least} on", where=name, hint="Correct it")
    return number


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
        """Returns the rank as passed, else as :meth:`of_process`, else a single rank.

        Raises:
            ConfigError: only one of the two is passed or set, or they are no numbers.
        """
        if (rank is None) != (world_size is None):
            raise ConfigError("one of rank and world_size is missing", where="ShardDataset", hint="Give both, or neither")
        if rank is not None and world_size is not None:
            return cls(rank, world_size, min(_local_world(), max(world_size, 1)))
        return cls.of_process() or cls()

    @classmethod
    def of_process(cls) -> Ranks | None:
        """Returns the rank of ``torch.distributed`` if it is initialized, else of ``RANK`` and ``WORLD_SIZE``, else ``None``.

        Raises:
            ConfigError: one of the variables is missing or no number.
        """
        dist = sys.modules.get("torch.distributed")
        if dist is not None and dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), _local_world())
        named = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
        if named[0] is None:
            return None
        if named[1] is None or not all(text is not None and text.isdigit() for text in named):
            raise ConfigError(
                f"RANK is {named[0]!r} and WORLD_SIZE is {named[1]!r}",
                where="environment",
                hint="Set both to numbers, as torchrun does, or pass rank and world_size",
            )
        return cls(int(named[0]), int(named[1]), _local_world())


def _local_world() -> int:
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(local) if local.isdigit() and int(local) > 0 else 1


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

    def at(self, position: int, world: int | None) -> tuple[int, int]:
        """Returns the unit at a position, and how many of its samples each rank has had.

        Args:
            position: samples that all ranks have had.
            world: number of ranks among which they were shared; ``None`` if it is not known. It matters within a step.

        Raises:
            DataError: the position lies within a step that another number of ranks has begun.
        """
        within = position % self.global_batch
        if within and (world != self.world or within % self.world):
            begun = f"that {world} ranks have begun" if world else "that an unknown number of ranks has begun"
            raise DataError(
                f"position {position} lies within a step of {self.global_batch} samples {begun}; {self.world} ranks cannot "
                "continue it",
                where="samples",
                hint=f"Use {world or 'as many'} ranks{'' if world else ' as before'}, or save after complete steps",
            )
        return divmod(position // self.world, self.batch)


@dataclass(frozen=True)
class Position:
    """How far a state is.

    Attributes:
        samples: samples of the order that all ranks have been given.
        world: number of ranks that shared them; ``None`` if the state does not say. It matters within a step.
    """

    samples: int
    world: int | None = None


def check_state(state: Any, identity: str) -> Position:
    """Returns the position in a state: of a data set, of a loader, or of a StatefulDataLoader around a data set.

    Raises:
        DataError: it is no such state, belongs to other data or another order, or its workers did not take turns by batches.
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
                "canonical_streams, shuffle_block_size, selection or sources",
                where="load_state_dict",
                hint="Use those of the run that was saved, or start at its position with seek()",
            )
    if isinstance(state, Mapping) and state.get("_steps_since_snapshot"):
        raise DataError(
            "the state of the StatefulDataLoader is older than its last batch",
            where="load_state_dict",
            hint="Leave snapshot_every_n_steps at 1",
        )
    return _position([dict(one) for one in states])


def _position(states: list[State]) -> Position:
    """The first sample that none of the workers has had; they must have taken turns, so that none has had a later one."""
    first = min(states, key=lambda one: int(one["samples"]))
    samples = int(first["samples"])
    if len(states) > 1:
        unit = first.get("batch_size", 0) * first.get("world_size", 0)
        turns = list(range(samples, samples + unit * len(states), unit)) if unit else []
        if sorted(int(one["samples"]) for one in states) != turns or samples % unit:
            raise DataError(
                "its workers did not take turns by batches of the data set, so no single position says what was read",
                where="load_state_dict",
                hint="Give the StatefulDataLoader batch_size=dataset.batch_size; this state fits one with as many workers only",
            )
    return Position(samples, first.get("world_size"))


def _states(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    if not isinstance(value, Mapping) or depth > 8:
        return
    samples, sizes = value.get("samples"), [value[name] for name in ("world_size", "batch_size") if name in value]
    sizes_are_valid = all(type(size) is int and 0 < size < 1 << 62 for size in sizes)
    if type(samples) is int and 0 <= samples < 1 << 62 and isinstance(value.get("order"), str) and sizes_are_valid:
        yield value
        return
    for inner in value.values():
        yield from _states(inner, depth + 1)
