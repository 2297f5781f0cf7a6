"""Measures the time of each phase of a step without synchronizing host and device.

On a GPU each phase begins with a CUDA event, and events are read only once they have completed: the times are those of the
device, so "data" is the time in which it was idle for lack of a batch. On a CPU the host's clock is used.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.estimate.flops import flop_counter
from pipeline.runtime.process_group import World
from pipeline.runtime.watchdog import CHECKPOINT, COMPUTE, DATA, END, EVALUATE, LOG, START, STEP, TEACHER, Watchdog

T = TypeVar("T")
_LOOP = {DATA: "data", COMPUTE: "forward_backward", STEP: "optimizer", TEACHER: "teacher", LOG: "log"}
_ASIDE = {EVALUATE: "evaluation", CHECKPOINT: "checkpoint", START: "start", END: "end"}

# Dense bf16 TFLOP/s from the vendors' data sheets, without sparsity; the first entry contained in the device's name is used.
_PEAKS = (
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H200", 989.0),
    ("H100", 989.0),
    ("GH200", 989.0),
    ("A100", 312.0),
    ("A40", 150.0),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.0),
    ("MI300X", 1307.0),
    ("MI250X", 383.0),
)


def peak_tflops(device: str, precision: str) -> float | None:
    """Dense peak TFLOP/s of a GPU by its name; ``None`` if unknown. The table holds only bf16."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in _PEAKS if name in device), None)


class Phases:
    """Reports the rank's current phase to the watchdog and measures how long each phase takes.

    Args:
        world: this rank's position in the process group.
        watchdog: receives the current phase.
        peak: TFLOP/s of the device for MFU, ``None`` for no MFU.
        count: whether FLOPs are counted in the first step; disabled for compiled blocks, which the counter would run uncompiled.
        flops: FLOPs of a step of this rank by the size of its work, see :meth:`counted`, if they are known without counting.
        clock: seconds on the host; a CUDA device has events.
    """

    def __init__(
        self,
        world: World,
        watchdog: Watchdog,
        peak: float | None = None,
        *,
        count: bool = True,
        flops: Mapping[Hashable, float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.watchdog, self._world, self._peak = watchdog, world, peak
        self._cuda, self._clock = world.device.type == "cuda", clock
        self._marks: deque[tuple[str, Any]] = deque()
        self._totals: Counter[str] = Counter()
        self._steps = 0
        self._flops: dict[tuple[str, Hashable], int] | None = {} if count else None
        self._known_flops = flops or {}
        self._calls: Counter[tuple[str, Hashable]] = Counter()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin a phase and end the previous one."""
        self.watchdog.enter(phase, step)
        mark: Any = self._clock()
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((phase, mark))
        if not self._cuda:
            self._collect()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context of a nested phase; the outer phase continues afterwards."""
        before = self.watchdog.position[0]
        self.enter(name)
        yield
        self.enter(before)

    def counted(self, function: Callable[..., T], times: int, size: Hashable = None) -> Callable[..., T]:
        """Wrap a function; its first call for each size runs under torch's FLOP counter, which does not change the result.

        Args:
            function: a part of a step, such as the forward and backward pass of one micro-batch. Requested once per step.
            times: calls per step.
            size: what its work depends on, if that differs between steps.
        """
        flops, key = self._flops, (function.__name__, size)
        self._calls[key] += 1
        if flops is None or key in flops:
            return function

        def first(*arguments: Any) -> T:
            if key in flops:
                return function(*arguments)
            with flop_counter() as counter:
                result = function(*arguments)
            flops[key] = int(counter.get_total_flops()) * times
            return result

        return first

    def read(self) -> dict[str, float]:
        """Timings since the last call; collective. Work that a GPU has not finished yet counts next time.

        Returns:
            Mean seconds of a step, in total (``step_seconds``) and by phase, of which ``update`` is clipping, the optimizer and
            its collectives; total seconds of work outside the steps; FLOP/s; time before the collectives on the slowest and
            fastest rank.
        """
        self._collect()
        steps = max(self._steps, 1)
        parts = {f"{name}_seconds": self._totals[phase] / steps for phase, name in _LOOP.items()}
        step = sum(parts.values())
        values = {"step_seconds": step, **parts}
        values |= {f"{name}_seconds": self._totals[phase] for phase, name in _ASIDE.items() if self._totals[phase]}
        requests: Counter[str] = Counter()
        for (name, _), calls in self._calls.items():
            requests[name] += calls
        work = 0.0
        for (name, size), calls in self._calls.items():
            # Known FLOPs are those of all parts of a step, which are called equally often.
            known = self._known_flops.get(size, 0.0) / len(requests)
            work += (self._flops.get((name, size), 0) if self._flops else known) * calls / requests[name]
        if work and step > 0:
            achieved = work / step / 1e12
            values["tflops_per_rank"] = achieved
            if self._peak:
                values["mfu"] = achieved / self._peak
        # In the step's collectives the ranks wait for the slowest one, so that only the time before them differs between ranks.
        own = torch.tensor([self._totals[DATA] / steps, self._totals[COMPUTE] / steps], dtype=torch.float64)
        everyone = [torch.zeros_like(own) for _ in range(self._world.size)]
        dist.all_gather(everyone, own, group=self._world.control)
        busy = torch.stack(everyone).sum(1)
        values |= {"busy_seconds_max": float(busy.max()), "busy_seconds_min": float(busy.min())}
        values["slowest_rank"] = float(busy.argmax())
        self._totals.clear()
        self._calls.clear()
        self._steps = 0
        return values

    def _collect(self) -> None:
        while len(self._marks) > 1:
            (phase, begin), (_, end) = self._marks[0], self._marks[1]
            if self._cuda:
                if not end.query():
                    return
                self._totals[phase] += begin.elapsed_time(end) / 1000
            else:
                self._totals[phase] += end - begin
            self._steps += phase == STEP
            self._marks.popleft()


def memory_now(device: torch.device) -> dict[str, float]:
    """Bytes this rank uses: resident on the CPU; allocated, peak since the last call, and reserved on a GPU."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {
            "allocated": float(stats["allocated_bytes.all.current"]),
            "peak": float(stats["allocated_bytes.all.peak"]),
            "reserved": float(stats["reserved_bytes.all.current"]),
        }
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {"resident": float(pages * 4096)}
