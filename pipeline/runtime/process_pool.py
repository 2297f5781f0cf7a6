"""Pools of helper processes that never outlive the one that started them, even if it is killed."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def process_pool(workers: int, begin: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """A pool whose processes are started fresh (no fork of this one, which may hold threads and open connections).

    Args:
        workers: processes.
        begin: called once in each of them, with the arguments.
        arguments: must be picklable.
    """
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(dict(os.environ), begin, arguments))


def adopt(environment: dict[str, str]) -> None:
    """Takes over the variables of the process that asks for help: it may have set keys after the server of helpers began."""
    os.environ.clear()
    os.environ.update(environment)


def _begin(environment: dict[str, str], begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    adopt(environment)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _leave_with_parent() -> None:
    """A worker of an executor waits for work for ever; when the one who would send it is dead, it must go."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
