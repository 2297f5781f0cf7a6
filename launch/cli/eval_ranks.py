"""Starts the ranks of ``fovea eval``."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch import local
from launch.rank_environment import RankEnvironment, ranks_to_start
from pipeline.config.schema import Config
from pipeline.runtime.interpreter import module_command

if TYPE_CHECKING:
    from pipeline.runtime.process_group import World


def ranks_for(config: Config, ranks: int | None) -> int:
    """Number of ranks to start here: as requested, else one per GPU; 1 if this process is a rank already.

    Args:
        config: the settings; with gloo no GPU is used.
        ranks: the requested number.

    Raises:
        LaunchError: the request contradicts the launcher that started this process, or there are fewer GPUs.
    """
    return ranks_to_start(RankEnvironment.read(), ranks, where="--ranks", on_cpu=config.launch.backend == "gloo") or 1


def spread(command: Sequence[str], ranks: int, logs: Path | None) -> int:
    """Run the same command on several ranks of this host; returns the exit code.

    Args:
        command: the command line after ``fovea``.
        ranks: number of ranks.
        logs: log directory of all ranks but the first; by default a temporary one that is kept only after a failure.
    """
    folder = logs or Path(tempfile.mkdtemp(prefix="fovea-eval-"))
    code = local.start(module_command("launch.cli.main", *command), ranks, log_directory=folder)
    if logs is None and code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return code


@contextlib.contextmanager
def world_here(config: Config) -> Iterator[World]:
    """The process group of all ranks on which this command was started; of this process alone without a launcher.

    Args:
        config: the settings; with ``launch.backend=gloo`` no GPU is used.
    """
    from pipeline.runtime.process_group import join, leave

    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
    here = RankEnvironment.read()
    alone = here.world_size == 1
    world = join(
        rank=here.rank,
        size=here.world_size,
        local_rank=here.local_rank,
        address="127.0.0.1" if alone else here.address,
        port=here.port,
        key=secrets.token_hex(8) if alone else here.key,
        backend=config.launch.backend,
        timeout=config.launch.timeout,
        local_size=here.local_world_size,
    )
    complete = False
    try:
        yield world
        complete = True
    finally:
        if complete or alone:  # the others may be anywhere: a failed rank does not wait for them
            leave()
