"""What a stage of the proof is given, and what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

STAGES = ("imports", "decode", "stream", "kernels", "methods", "run", "speed", "data", "small", "ranks")
"""Modules of :mod:`pipeline.bench.prove`, in this order."""


@dataclass(frozen=True)
class Check:
    """One row of the result.

    Attributes:
        name: what was checked or measured.
        figure: what was found.
        bar: what it had to be; empty if it is only measured.
        ok: whether it is so; ``None`` if it is only measured, or could not be on this machine.
    """

    name: str
    figure: str
    bar: str = ""
    ok: bool | None = None


def at_most(name: str, found: float, most: float, unit: str = "") -> Check:
    """A number that must not be larger; NaN is."""
    return Check(name, f"{found:.3g}{unit}", f"≤ {most:g}{unit}", found <= most)


def at_least(name: str, found: float, least: float, unit: str = "") -> Check:
    """A number that must not be smaller."""
    return Check(name, f"{found:.3g}{unit}", f"≥ {least:g}{unit}", found >= least)


@dataclass(frozen=True)
class Place:
    """Where the proof runs.

    Attributes:
        device: ``cpu`` or ``cuda``.
        toy: sizes for a CPU in seconds instead of those of a GPU in minutes.
        folder: for files of the stage; empty.
        photos: folder of photographs, or ``None`` for drawn scenes.
    """

    device: Literal["cpu", "cuda"]
    toy: bool
    folder: Path
    photos: Path | None = None

    @property
    def device_id(self) -> int | None:
        """Number of the last CUDA device, where a thread that works on the first one shows; ``None`` on a CPU."""
        if self.device == "cpu":
            return None
        import torch

        return torch.cuda.device_count() - 1


class Stage(Protocol):
    """A module of a stage."""

    def checks(self, place: Place) -> Iterator[Check]:
        """Yield each result as soon as it is known."""
