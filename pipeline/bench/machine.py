"""Describes the host of a benchmark; measures CPU time."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "pillow", "numpy")
_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """User and system CPU seconds of this process and all its descendants, running and ended; resolution of a clock tick."""
    children: dict[int, list[int]] = {}
    times: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended meanwhile
            continue
        number = int(entry.name)
        children.setdefault(int(fields[1]), []).append(number)
        times[number] = sum(int(field) for field in fields[11:15])
    total, pending = 0, [os.getpid()]
    while pending:
        number = pending.pop()
        total += times.get(number, 0)
        pending += children.get(number, [])
    return total / _TICK


def describe() -> dict[str, str]:
    """Date, processor, number of usable cores, load, system and versions of the relevant packages."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        **{name: package_version(name) for name in _PACKAGES},
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def package_version(package: str) -> str:
    """The installed version of a package, or ``not installed``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
