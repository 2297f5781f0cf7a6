"""File locks between processes, also on file systems without lock support.

``flock`` is missing on Lustre mounted without ``-o flock``, and on some NFS, EFS and FUSE mounts. There the caller continues
without the lock, and one line on stderr names the file and its file system.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from pathlib import Path

from pipeline.untrusted import printable

_UNSUPPORTED = frozenset((errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY))
_named: set[str] = set()


def lock(descriptor: int, path: str | os.PathLike[str], *, wait: bool = True, shared: bool = False) -> bool:
    """Locks an open file until it is closed.

    Args:
        descriptor: descriptor of the open file.
        path: its name, for the message.
        wait: block until the lock is free.
        shared: take a shared lock.

    Returns:
        Whether the lock is held; ``False`` if the file system has no locks, which is reported once per process and file system.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is false.
        OSError: any other failure.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError) or error.errno not in _UNSUPPORTED:
            raise
        mount, name = file_system(Path(path))
        if mount not in _named:
            _named.add(mount)
            shown = printable(f"{path} cannot be locked ({error.strerror}): the {name} file system at {mount} has no flock")
            print(f"fovea: {shown}; continuing without a lock. No second process may write there", file=sys.stderr, flush=True)
        return False
    return True


def file_system(path: Path) -> tuple[str, str]:
    """Returns mount point and type (``ext4``, ``nfs4``, ``lustre``…) of the file system of a path; ``?`` where unknown."""
    real, best = os.path.realpath(path), ("?", "?")
    try:
        rows = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return best
    for row in rows:
        left, _, right = row.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        mount = fields[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and (best[0] == "?" or len(mount) >= len(best[0])):
            best = (mount, right.split()[0])
    return best
