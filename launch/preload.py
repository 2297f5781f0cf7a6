"""The process that imports everything and forks the ranks: whether a launch has one, and its start. Does not import torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from launch import host_memory, local
from launch.forked import RankServer
from pipeline.runtime.gpus import gpus
from pipeline.runtime.startup_phases import VARIABLE

if TYPE_CHECKING:
    from pipeline.config.schema import Config

_OF_ONE_START = (host_memory.VARIABLE, host_memory.LAST_START, VARIABLE)


def surroundings() -> dict[str, str]:
    """This process's environment variables, without those that a launcher sets for one start."""
    return {name: value for name, value in os.environ.items() if name not in _OF_ONE_START}


def rank_server(config: Config, ranks: int) -> RankServer | None:
    """Starts the process that forks the ranks, if they are to be forked, and returns at once while it imports.

    Args:
        config: the settings.
        ranks: number of ranks on this host.
    """
    if not (config.launch.preload or (config.launch.preload is None and not gpus())):
        return None
    shared = local.common_environment(ranks, surroundings(), config.train.threads)
    return RankServer(local.tied([]), shared, compiling=ranks if config.train.compile else 0)
