"""What a run recorded of its steps: signatures of all attempts and ranks, merged. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ConfigError, DataError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.training.signature_file import Damage, Header, Signature, Weights, read
from pipeline.untrusted import printable

_NAME = re.compile(r"attempt-(\d{4,9})-rank-(\d{1,6})\.bin", re.ASCII)


@dataclass
class Overview:
    """The steps that a run recorded, from the files of rank 0.

    Attributes:
        headers: by attempt.
        attempts: the attempt that did each step last.
        damaged: damaged or incomplete records.
    """

    headers: dict[int, Header] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    damaged: int = 0

    @property
    def last(self) -> int:
        """The last recorded step, -1 for none."""
        return max(self.attempts, default=-1)


@dataclass(frozen=True)
class RankRecord:
    """What one rank recorded of some steps.

    Attributes:
        signatures: of each step, by the attempt that did it last.
        weights: digests of its part of checkpoints, by step, with the header of the attempt that saved it.
        redone: steps that were done more than once by the same number of ranks.
        unequal: those of them whose signatures differ.
    """

    signatures: dict[int, Signature] = field(default_factory=dict)
    weights: dict[int, tuple[Header, Weights]] = field(default_factory=dict)
    redone: set[int] = field(default_factory=set)
    unequal: set[int] = field(default_factory=set)


def files(run: RunDirectory) -> dict[int, list[tuple[int, Path]]]:
    """Attempts and files of the signatures of each rank that has some, by attempt."""
    by_rank: dict[int, list[tuple[int, Path]]] = {}
    for path in run.signature_folder.glob("attempt-*.bin"):
        if match := _NAME.fullmatch(path.name):
            by_rank.setdefault(int(match[2]), []).append((int(match[1]), path))
    return {rank: sorted(each) for rank, each in by_rank.items()}


def overview(run: RunDirectory) -> Overview:
    """Reads which attempt did each step of a run.

    Raises:
        ConfigError: the run has no signatures, or they cannot be read.
    """
    result = Overview()
    damage = Damage()
    for attempt, path in files(run).get(0, []):
        for record in _read(path, damage):
            if isinstance(record, Header):
                if (record.attempt, record.rank) == (attempt, 0):
                    result.headers.setdefault(attempt, record)
            elif isinstance(record, Signature) and attempt in result.headers:
                result.attempts[record.step] = attempt
    result.damaged = damage.records
    if not result.attempts:
        raise ConfigError(
            "the run has no signatures to compare with",
            where=printable(str(run.signature_folder)),
            hint="Train with train.signatures=true; runs of versions before signatures have none, and --dump alone replays them",
        )
    return result


def of_ranks(run: RunDirectory, world: int, attempts: dict[int, int], first: int, last: int) -> list[RankRecord]:
    """Reads the signatures of the steps ``first`` to ``last``, each from the attempt that did it last, of each rank.

    Args:
        run: the run.
        world: number of ranks; those that left no file have an empty record.
        attempts: the attempt of each step, see :class:`Overview`.
        first, last: both inclusive.
    """
    each, nothing = files(run), RankRecord()
    return [_of_rank(rank, each[rank], attempts, first, last) if rank in each else nothing for rank in range(world)]


def _of_rank(rank: int, each: list[tuple[int, Path]], attempts: dict[int, int], first: int, last: int) -> RankRecord:
    result = RankRecord()
    earlier: dict[tuple[int, int], Signature] = {}
    for attempt, path in each:
        header, world = None, 0
        for record in _read(path, Damage()):
            if isinstance(record, Header):
                if (record.attempt, record.rank) != (attempt, rank):
                    break  # a file of another rank under this name
                header, world = record, record.world
            elif isinstance(record, Weights):
                if header is not None and first <= record.step <= last + 1:
                    result.weights[record.step] = header, record
            elif first <= record.step <= last:
                before = earlier.get((record.step, world))
                if before is not None:
                    result.redone.add(record.step)
                    if before.bits != record.bits:
                        result.unequal.add(record.step)
                earlier[record.step, world] = record
                if attempts.get(record.step) == attempt:
                    result.signatures[record.step] = record
    return result


def _read(path: Path, damage: Damage) -> Iterator[Header | Signature | Weights]:
    try:
        yield from read(path, damage)
    except (OSError, DataError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"the signatures cannot be read ({reason})", where=printable(str(path)), hint="Check the path and its permissions"
        ) from None
