"""How busy each machine of a run is: processors, memory, disk, network and GPUs, one line for a node."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from pipeline.training.distributed import World

NAMES = ("cpu_share", "memory_share", "disk_free_gb", "received_mb_per_s", "sent_mb_per_s", "gpu_share", "gpu_memory_share")
_ABSENT = float("nan")


class Nodes:
    """Reads this machine and gathers all.

    Args:
        world: this rank's place; the first rank of a machine speaks for it.
        folder: on the disk whose free space counts.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self._folder = world, folder
        self._since, self._network = time.monotonic(), psutil.net_io_counters()
        psutil.cpu_percent()  # the next call tells the share since this one

    def read(self) -> dict[str, float]:
        """``node<n>/<name>`` for each machine since the last call, without what it does not have; all ranks call it."""
        own = torch.full((1 + len(NAMES),), _ABSENT, dtype=torch.float64)
        own[0] = self._world.local_rank
        if self._world.local_rank == 0:
            own[1:] = torch.tensor(self._machine(), dtype=torch.float64)
        everyone = [torch.zeros_like(own) for _ in range(self._world.size)]
        dist.all_gather(everyone, own, group=self._world.control)
        machines = [row[1:].tolist() for row in everyone if row[0] == 0]
        return {
            f"node{number}/{name}": value
            for number, machine in enumerate(machines)
            for name, value in zip(NAMES, machine, strict=True)
            if value == value
        }

    def _machine(self) -> list[float]:
        now, network = time.monotonic(), psutil.net_io_counters()
        seconds = max(now - self._since, 1e-3)
        rates = [_ABSENT, _ABSENT]
        if network is not None and self._network is not None:
            received, sent = network.bytes_recv - self._network.bytes_recv, network.bytes_sent - self._network.bytes_sent
            rates = [received / seconds / 1e6, sent / seconds / 1e6]
        self._since, self._network = now, network
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._folder))
        return [psutil.cpu_percent() / 100, memory.percent / 100, disk.free / 1e9, *rates, *self._gpus()]

    def _gpus(self) -> list[float]:
        """Mean share of time in which this machine's GPUs computed, and of their memory that is taken."""
        if self._world.device.type != "cuda":
            return [_ABSENT, _ABSENT]
        devices = range(torch.cuda.device_count())
        used = [1 - free / whole for free, whole in (torch.cuda.mem_get_info(device) for device in devices)]
        return [_mean(torch.cuda.utilization, len(used)) / 100, sum(used) / len(used)]


def _mean(read: Callable[[int], int], count: int) -> float:
    try:
        return sum(read(device) for device in range(count)) / count
    except (RuntimeError, ImportError, OSError):  # NVML's Python half is not everywhere
        return _ABSENT
