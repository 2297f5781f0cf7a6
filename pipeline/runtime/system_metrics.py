"""System metrics of each node of a run: CPU, memory, disk, network and GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from pipeline.runtime.process_group import World

MACHINE = ("cpu_share", "memory_share", "disk_free_gb", "received_mb_per_s", "sent_mb_per_s")
NAMES = (*MACHINE, "gpu_share", "gpu_memory_share")
_ABSENT = float("nan")


class Nodes:
    """Reads the metrics of this node and gathers those of all nodes.

    Values that cannot be read are omitted, so that tracking never stops training.

    Args:
        world: this rank's position; the first rank of a node reports for the node, and each rank for its own GPU.
        folder: a directory on the disk whose free space is reported.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self._folder = world, folder
        self._since, self._network = time.monotonic(), _read(psutil.net_io_counters)
        _read(psutil.cpu_percent)  # the next call returns the average since this one

    def read(self) -> dict[str, float]:
        """Returns ``node<n>/<name>`` of each node since the last call, without missing values. Must be called on all ranks."""
        first = self._world.local_rank == 0
        machine = self._machine() if first else [_ABSENT] * len(MACHINE)
        own = torch.tensor([float(first), *machine, *self._gpu()], dtype=torch.float64)
        everyone = [torch.zeros_like(own) for _ in range(self._world.size)]
        dist.all_gather(everyone, own, group=self._world.control)
        rows = torch.stack(everyone)
        node = rows[:, 0].cumsum(0) - 1  # the ranks of a node are consecutive
        metrics: dict[str, float] = {}
        for number in range(int(node.max()) + 1):
            mean = rows[node == number, 1:].nanmean(0).tolist()
            metrics |= {f"node{number}/{name}": value for name, value in zip(NAMES, mean, strict=True) if value == value}
        return metrics

    def _machine(self) -> list[float]:
        now, network = time.monotonic(), _read(psutil.net_io_counters)
        seconds = max(now - self._since, 1e-3)
        rates = [_ABSENT, _ABSENT]
        if network is not None and self._network is not None:
            received, sent = network.bytes_recv - self._network.bytes_recv, network.bytes_sent - self._network.bytes_sent
            rates = [received / seconds / 1e6, sent / seconds / 1e6]
        self._since, self._network = now, network
        busy, memory = _read(psutil.cpu_percent), _read(psutil.virtual_memory)
        disk = _read(lambda: psutil.disk_usage(str(self._folder)))
        return [
            _ABSENT if busy is None else busy / 100,
            _ABSENT if memory is None else memory.percent / 100,
            _ABSENT if disk is None else disk.free / 1e9,
            *rates,
        ]

    def _gpu(self) -> list[float]:
        """Returns the fraction of time in which this rank's GPU was busy, and of its memory in use by any process."""
        device = self._world.device
        if device.type != "cuda":
            return [_ABSENT, _ABSENT]
        busy, memory = _read(lambda: torch.cuda.utilization(device)), _read(lambda: torch.cuda.mem_get_info(device))
        return [_ABSENT if busy is None else busy / 100, _ABSENT if memory is None else 1 - memory[0] / memory[1]]


def _read(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception:  # drivers and kernels raise arbitrary exceptions, some without a documented class
        return None
