"""A small disk that a test fills: a file system in memory, or without the right to mount one, errors where data is flushed."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from tests.helpers.cluster_runs import until

Resize = Callable[[str], None]


def mounted(folder: Path, size: str) -> bool:
    """Mounts a file system of a size such as ``16m`` on a folder; whether that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return not os.getuid() and not subprocess.run(command, check=False, capture_output=True).returncode


def unmount(folder: Path) -> None:
    """Unmounts it, as soon as no process uses it."""
    until(lambda: not subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode, "it is in use")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Resize]:
    """A disk of a size; yields a function that gives it another one. Without mounts, one below 1 MB is full, in this process."""
    folder.mkdir()
    if mounted(folder, size):
        try:
            yield lambda other: subprocess.run(["mount", "-o", f"remount,size={other}", str(folder)], check=True) and None
        finally:
            unmount(folder)
        return
    full, real = [size.endswith("k")], os.fsync

    def fsync(descriptor: int) -> None:
        if full[0] and Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with mock.patch.object(os, "fsync", fsync):
        yield lambda other: full.__setitem__(0, other.endswith("k"))
