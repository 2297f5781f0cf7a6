"""Starts gloo ranks on this host for a benchmark, and returns what the first of them measured."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import ConfigError


def on_ranks(function: Callable[..., Any], ranks: int, *, command: str, **arguments: Any) -> Any:
    """Call a function on new ranks of one thread each, which all run on the CPU.

    Args:
        function: of a module, called on every rank in a process group.
        ranks: number of ranks.
        command: the benchmark, for its error.
        arguments: of the function; pickled.

    Returns:
        The result of rank 0.

    Raises:
        ConfigError: the ranks failed.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="fovea-bench-") as folder:
        ours, theirs = context.Pipe(duplex=False)
        processes = [
            context.Process(target=_serve, args=(rank, ranks, folder, theirs, function, arguments)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        try:
            return ours.recv()
        except EOFError as error:
            raise ConfigError("the ranks ended without a result", where=command, hint="See their output above") from error
        finally:
            for process in processes:
                process.join()


def _serve(rank: int, ranks: int, folder: str, pipe: Any, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=ranks)
    result = function(**arguments)
    if rank == 0:
        pipe.send(result)
    pipe.close()
    dist.barrier()
    dist.destroy_process_group()
