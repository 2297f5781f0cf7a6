"""Formats durations."""

from __future__ import annotations

import math


def clock(seconds: float) -> str:
    """Formats seconds as ``1:02:03``, or ``2:03`` below an hour; ``?`` if they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    total = int(max(seconds, 0))
    hours, rest = divmod(total, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
