"""Real ranks for tests: a few processes joined by gloo, started once and given one function after another.

Loading DeepSpeed takes seconds, so it is done once in a process from which all ranks are forked, and all tests of a session share
the pools: ``pool(2)`` is two ranks, ``pool(1)`` one.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
START = "forkserver"  # "fork": with the modules of this process, as the mutation runner needs
TIMEOUT, GRACE = 1200.0, 30.0  # seconds; a busy machine is many times slower, so they only catch what hangs


def _serve(rank: int, size: int, folder: str, orders: Connection) -> None:
    os.environ.update(ENVIRONMENT)
    import torch
    import torch.distributed as dist

    if START == "forkserver":
        from pipeline.training import engine  # noqa: F401  - the slow part of the start

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = orders.recv()
            try:
                orders.send((None, function(**arguments)))
            except BaseException:
                orders.send((traceback.format_exc(), None))


class Pool:
    """Ranks that wait for work.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context(START)
        context.set_forkserver_preload(["pipeline.training.engine"])  # loaded once, for the ranks of all pools
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._ranks = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._folder.name, theirs), daemon=True)
            with mock.patch.dict(os.environ, ENVIRONMENT):  # for the process they are forked from, if this one starts it
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._ranks.append(process)

    def run(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Call a module's function with the same arguments on every rank; what each returns, by rank.

        Raises:
            AssertionError: a rank raised, died or hung; the pool is then taken down, for its ranks are out of step.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        end, pending = time.monotonic() + TIMEOUT, {pipe: rank for rank, pipe in enumerate(self._pipes)}
        results: list[Any] = [None] * len(pending)
        failures = []
        while pending and (ready := wait(list(pending), max(end - time.monotonic(), 0.0))):
            for pipe in ready:
                rank = pending.pop(pipe)  # type: ignore[call-overload]
                try:
                    failure, results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    failure = "died"
                if failure:
                    failures.append(f"rank {rank}: {failure}")
                    end = min(end, time.monotonic() + GRACE)  # the others may wait for it for ever
        failures += [f"rank {rank} hangs" for rank in pending.values()]
        if failures:
            self.close()
            pool.cache_clear()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        """Ends the ranks."""
        for process in self._ranks:
            process.kill()
            process.join()
        self._folder.cleanup()


@cache
def pool(size: int) -> Pool:
    """The pool of so many ranks."""
    made = Pool(size)
    atexit.register(made.close)
    return made
