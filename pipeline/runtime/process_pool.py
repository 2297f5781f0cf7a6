"""Pools of worker processes that end with their parent, even if it is killed."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def process_pool(workers: int, begin: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Creates a pool of spawned processes (not forked: this process may have threads and open connections).

    Args:
        workers: number of processes.
        begin: called once in each process, with ``arguments``.
        arguments: must be picklable.
    """
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(dict(os.environ), begin, arguments))


def adopt(environment: dict[str, str]) -> None:
    """Applies the environment variables of the parent, which may have changed after the process server was started."""
    os.environ.clear()
    os.environ.update(environment)


def _begin(environment: dict[str, str], begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    adopt(environment)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _leave_with_parent() -> None:
    """Ends this worker when its parent dies; an executor's worker would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
