"""Fragments: what a checkpoint asks of the engine whose weights it writes and reads.

A *fragment* is the piece of one parameter that one rank owns. Every element of every trainable parameter is in exactly one
rank's fragments, whatever the ZeRO stage, so any number of ranks can read what any other number wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """The piece of one parameter that this rank owns, as views into the optimizer's own memory.

    Attributes:
        name: the parameter's name in the method.
        start: first element of the piece in the flattened parameter.
        shape: the whole parameter's shape.
        master: fp32 ``[elements]``, the weights that the optimizer moves.
        moments: fp32 ``[elements]`` each: AdamW's and LAMB's ``exp_avg`` and ``exp_avg_sq``, LARS's ``momentum_buffer``.
        gradient: the averaged gradient, after backward and before the step.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    master: Tensor
    moments: dict[str, Tensor]
    gradient: Tensor | None


class ShardedWeights(Protocol):
    """Student, moments and teacher as the ranks hold them: :class:`pipeline.training.engine.Engine` to a checkpoint."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all trainable parameters by name."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's pieces of all trainable parameters."""

    def held(self) -> Iterator[Fragment]:
        """What a checkpoint has to give this rank: its fragments, or more."""

    def teacher_pieces(self, *, owned: bool) -> Iterator[tuple[str, int, Tensor]]:
        """Name, first element and fp32 memory ``[elements]`` of the teacher's weights on this rank."""

    def gathered(self, *, teacher: bool = False, write: bool = False) -> AbstractContextManager[None]:
        """Within it the parameters that no optimizer moves are whole on every rank."""

    def set_optimizer_steps(self, steps: int) -> None:
        """Set the optimizer's own count of steps."""

    def refresh(self) -> None:
        """After fragments were written: bring every rank's parameters up to date."""
