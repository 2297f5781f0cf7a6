"""Fragments: the interface through which checkpoints read and write an engine's sharded weights.

A *fragment* is the part of one parameter that one rank owns. Every element of every trainable parameter is in exactly one
rank's fragments, whatever the ZeRO stage, so a checkpoint written with any world size can be read with any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that this rank owns, as views into the optimizer's own memory.

    Attributes:
        name: the parameter's name in the method.
        start: index of the first element in the flattened parameter.
        shape: the whole parameter's shape.
        master: fp32 ``[elements]``, the weights that the optimizer updates.
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
    """Student, moments and teacher as sharded over ranks; :class:`pipeline.training.engine.Engine` implements it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all trainable parameters by name."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragments of all trainable parameters."""

    def held(self) -> Iterator[Fragment]:
        """The fragments that this rank must load from a checkpoint: its own, or more."""

    def teacher_pieces(self, *, owned: bool) -> Iterator[tuple[str, int, Tensor]]:
        """Name, first element and fp32 memory ``[elements]`` of the teacher's weights on this rank."""

    def gathered(self, *, teacher: bool = False, write: bool = False) -> AbstractContextManager[None]:
        """Context in which the parameters that no optimizer updates are complete on every rank."""

    def set_optimizer_steps(self, steps: int) -> None:
        """Sets the optimizer's own step count."""

    def refresh(self) -> None:
        """Updates every rank's parameters after fragments were written."""
