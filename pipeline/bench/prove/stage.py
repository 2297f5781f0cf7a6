"""Types of a stage of the proof: its input and its result."""

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
        name: name of the check or measurement.
        figure: the result.
        bar: the requirement; empty for a measurement.
        ok: whether the requirement is met; ``None`` for a measurement, or if this machine cannot check it.
    """

    name: str
    figure: str
    bar: str = ""
    ok: bool | None = None


def at_most(name: str, value: float, most: float, unit: str = "") -> Check:
    """Check that a number is not larger than a limit; NaN fails."""
    return Check(name, f"{value:.3g}{unit}", f"≤ {most:g}{unit}", value <= most)


def at_least(name: str, value: float, least: float, unit: str = "") -> Check:
    """Check that a number is not smaller than a limit; NaN fails."""
    return Check(name, f"{value:.3g}{unit}", f"≥ {least:g}{unit}", value >= least)


@dataclass(frozen=True)
class Setup:
    """Device and size of the checks.

    Attributes:
        device: ``cpu`` or ``cuda``.
        toy: whether sizes are small enough for a CPU.
        folder: empty directory for the stage's files.
        photos: directory of photographs, or ``None`` for synthetic scenes.
    """

    device: Literal["cpu", "cuda"]
    toy: bool
    folder: Path
    photos: Path | None = None

    @property
    def device_id(self) -> int | None:
        """Number of the last CUDA device, so that work on the first one by mistake is detected; ``None`` on a CPU."""
        if self.device == "cpu":
            return None
        import torch

        return torch.cuda.device_count() - 1


class Stage(Protocol):
    """A module of a stage."""

    def checks(self, setup: Setup) -> Iterator[Check]:
        """Yield each result as soon as it is available."""
