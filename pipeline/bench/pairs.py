"""Measures baselines side by side: in turns, in one process, so that any slowdown of the host affects all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.estimate.activations import Alive


@dataclass(frozen=True)
class Case:
    """Measurements of one case.

    Attributes:
        seconds: per round: CPU time of this process on a CPU, the stream's own time on a GPU.
        peak: peak bytes of live tensors during one round, in addition to those before.
    """

    seconds: tuple[float, ...]
    peak: int

    @property
    def middle(self) -> float:
        """The median round."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The fastest round, the least disturbed one on a busy CPU."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.middle


@dataclass(frozen=True)
class Contest:
    """A training step of ours and of a baseline. Neither changes weights, so that every round is the same.

    Attributes:
        ours: a whole step; returns the loss.
        theirs: the baseline's name and step, ``None`` if it is not installed.
        blocks: our blocks, to be compiled.
        losses: of both for the same weights, without randomness; ``None`` without a baseline.
        about: model, batch and content of a step.
    """

    ours: Callable[[], float]
    theirs: tuple[str, Callable[[], float]] | None
    blocks: list[Any]
    losses: Callable[[], tuple[float, float]] | None
    about: str


def operations(act: Callable[[], object]) -> int:
    """Number of operations that torch dispatches during a call, without views; on a GPU each of them is launched."""
    with _Counted() as counted:
        act()
    return counted.calls


class _Counted(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        views = bool(returned) and all(a.alias_info is not None and not a.alias_info.is_write for a in returned)
        self.calls += not views and func.namespace in ("aten", "c10d") and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **(kwargs or {}))


def measure(cases: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device, warm: int = 1) -> dict[str, Case]:
    """Run all cases in turns.

    Args:
        cases: functions to run, by name.
        rounds: measured rounds of each.
        device: their device.
        warm: warm-up rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warm + rounds):
        for name, act in cases.items():
            spent = _timed(act, device)
            if number >= warm:
                seconds[name].append(spent)
    return {name: Case(tuple(seconds[name]), peak_bytes(act, device)) for name, act in cases.items()}


def _timed(act: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        act()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1000
    before = time.process_time()
    act()
    return time.process_time() - before


def peak_bytes(act: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of live tensors during a call, in addition to those before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        act()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with Alive() as alive:
        act()
    return alive.peak


def table(cases: Mapping[str, Case], baseline: str, *, unit: str = "ms") -> list[str]:
    """Markdown rows: time, spread, time relative to the baseline, memory, memory relative to the baseline."""
    base, factor = cases[baseline], {"ms": 1e3, "s": 1.0}[unit]
    rows = [f"| | {unit} | spread | {baseline} takes | peak MB | {baseline} takes |", "|---|---:|---:|---:|---:|---:|"]
    for name, case in cases.items():
        slower, larger = base.best / max(case.best, 1e-12), base.peak / max(case.peak, 1)
        time_ = f"{case.middle * factor:.1f} | {case.spread:.0%} | {slower:.2f} times"
        rows.append(f"| {name} | {time_} | {case.peak / 1e6:,.1f} | {larger:.2f} times |")
    return rows
