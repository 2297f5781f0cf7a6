"""Counts the GPUs that a process may use, without importing torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path


def gpus(environment: Mapping[str, str] | None = None) -> int:
    """Number of GPUs of this host that CUDA makes visible to this process.

    Args:
        environment: variables, of which ``CUDA_VISIBLE_DEVICES`` is used; this process's by default.
    """
    env = os.environ if environment is None else environment
    device_count = sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    return visible(device_count, env.get("CUDA_VISIBLE_DEVICES"))


def visible(device_count: int, chosen: str | None) -> int:
    """Number of GPUs that ``CUDA_VISIBLE_DEVICES`` leaves visible, by CUDA's own rules.

    Numbers, UUIDs (``GPU-…``) or MIG instances count up to the first invalid entry, a repetition makes the whole list empty, and
    a process never sees more than one MIG instance.

    Args:
        device_count: GPUs of the host.
        chosen: the variable's value, ``None`` if it is not set.
    """
    if chosen is None:
        return device_count
    parts = [part.strip() for part in chosen.split(",")]
    for prefix in ("GPU-", "MIG-"):
        if parts[0].startswith(prefix):
            named = _until(parts, partial(_name, prefix=prefix))
            return min(len(named), 1 if prefix == "MIG-" else device_count) if device_count else 0
    return len(_until(parts, partial(_number, device_count=device_count)))


def _name(part: str, prefix: str) -> str | None:
    return part if part.startswith(prefix) and len(part) > len(prefix) else None


def _number(part: str, device_count: int) -> int | None:
    match = re.match(r"\d+", part)
    return int(match[0]) if match and int(match[0]) < device_count else None


def _until(parts: list[str], read: Callable[[str], object]) -> list[object]:
    """Parse a list up to the first invalid entry; empty if an entry is repeated."""
    taken: list[object] = []
    for part in parts:
        value = read(part)
        if value is None:
            break
        if value in taken:
            return []
        taken.append(value)
    return taken


def shown(environment: Mapping[str, str] | None = None) -> str:
    """The variable that selects the GPUs, for messages; empty if it is not set."""
    env = os.environ if environment is None else environment
    return f" (CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']!r})" if "CUDA_VISIBLE_DEVICES" in env else ""
