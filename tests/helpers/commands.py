"""The command ``fovea`` in the process of a test."""

from __future__ import annotations

from pathlib import Path

from launch.cli.main import main


def fovea(*words: str | Path) -> int:
    """Runs a command line and returns its exit code.

    Args:
        words: what follows ``fovea``.
    """
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0
