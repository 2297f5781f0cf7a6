"""The folder in host memory in which a run keeps its snapshots. Standard library only.

``python -m launch.host_memory RUN`` keeps that of one node of a job that has several.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.errors import LaunchError
from pipeline.runtime.locks import lock

VARIABLE = "FOVEA_SNAPSHOTS"  # tells the ranks where it is; with _NODE in place of the node's name if there are several nodes
LAST_START = "FOVEA_LAST_START"  # set if no restart is left, so that no later start would read a snapshot
_MEMORY = Path("/dev/shm")
READY, FAILED = "fovea-ready", "fovea-failed"  # a keeper's first word
_TRIES = 20
_NODE = "%h"
_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def path_of(run: Path, node: str = "") -> Path:
    """Path of a run's folder; the same for each start, so that one left behind by a killed launcher is found.

    Args:
        run: the run directory.
        node: name of the node, if there are several.
    """
    name = hashlib.blake2b(os.fsencode(run.resolve()), digest_size=10).hexdigest()
    return _MEMORY / f"fovea-{os.getuid()}-{name}{'-' if node else ''}{node}"


def of_all_nodes(run: Path) -> str:
    """The value of the variable for ranks on several nodes."""
    return str(path_of(run, _NODE))


def of_this_node(environment: Mapping[str, str]) -> Path | None:
    """The folder of this node that the variable names; ``None`` if there is none."""
    value = environment.get(VARIABLE)
    return Path(value.replace(_NODE, _this_node(environment))) if value else None


def _this_node(environment: Mapping[str, str]) -> str:
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


@contextlib.contextmanager
def folder(run: Path, node: str = "") -> Iterator[Path]:
    """An empty folder, readable by this user only, that is removed in the end.

    It is locked as long as this process lives: folders without a lock are of processes that were killed, and they are removed
    here, whichever run they belong to.

    Raises:
        LaunchError: there is no such file system, another user has something of that name, or another process uses it.
    """
    _remove_abandoned()
    path = path_of(run, node)
    handle = _claimed(path)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), path.lstat()):
                shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _claimed(path: Path) -> int:
    """Makes an empty folder and locks it; another process may remove it as an abandoned one before it is locked."""
    for _ in range(_TRIES):
        if not _is_free(path):  # also for the moment in which another process removes it as an abandoned one
            time.sleep(0.05)
            continue
        try:
            empty(path)
        except LaunchError as error:
            if not isinstance(error.__cause__, FileExistsError):  # else another process has just removed it and made its own
                raise
            continue
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                lock(handle, path, wait=False)
                if os.path.samestat(os.fstat(handle), path.lstat()):
                    return handle
            except OSError:
                os.close(handle)
                raise
            os.close(handle)
        time.sleep(0.05)
    raise LaunchError("is in use by another process", where=str(path), hint="End the other start of this run")


def _is_free(path: Path) -> bool:
    """Whether no living process uses it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # there is none, or something else of that name, which is reported when it is to be emptied
        return True
    try:
        lock(handle, path, wait=False)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def newest_step(path: Path) -> int:
    """Number of steps of the newest snapshot in a folder, complete or not readable here; -1 if there is none."""
    names = [entry.name.removeprefix("step_") for entry in path.glob("step_*")]
    return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=-1)


def _remove_abandoned() -> None:
    """Removes the folders of this user whose processes are gone: host memory is not freed by itself."""
    for path in _MEMORY.glob(f"fovea-{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid == os.getuid() and lock(handle, path, wait=False):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def empty(path: Path) -> None:
    """Makes the folder, or empties it.

    Raises:
        LaunchError: as :func:`folder`.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            about = path.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                raise LaunchError("is not this user's folder", where=str(path), hint="Remove it, or have its owner remove it")
            shutil.rmtree(path)
        path.mkdir(mode=0o700)
    except OSError as error:
        raise LaunchError(
            f"no folder for snapshots can be made in host memory ({error.strerror})",
            where=str(path),
            hint="Set checkpoint.snapshot_every=null, or give the container a larger /dev/shm",
        ) from error


def _end(*_: object) -> None:
    for number in _END:  # once: not while it cleans up
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def main() -> int:
    """Keep the folder of this node until the standard input ends, or a signal comes; says so as soon as it is there."""
    for number in (*_END, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _end if number in _END else signal.SIG_IGN)
    try:
        with folder(Path(sys.argv[1]), _this_node(os.environ)) as path:
            print(READY, path, flush=True)
            sys.stdin.buffer.read()
    except LaunchError as error:
        print(FAILED, flush=True)
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
