"""Starts modules of ours in new interpreters, whatever lies in the working directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_OF_LAUNCHERS = frozenset(
    (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "FOVEA_ATTEMPT", "FOVEA_KEY"),
        *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    )
)
ROOT = Path(__file__).resolve().parents[2]

# The module is searched as by ``python -m``, but never in the working directory, and found where this process found it: a folder
# of ours that comes later on the path than another package of the same name is put in front.
_START = (
    "import sys\n"
    "root, name = sys.argv[1:3]\n"
    "del sys.argv[1:3]\n"
    "import importlib.util, os, runpy\n"
    "spec = importlib.util.find_spec(name.partition('.')[0])\n"
    "if spec is None or not spec.origin or os.path.dirname(os.path.dirname(os.path.realpath(spec.origin))) != root:\n"
    "    sys.modules.pop(name.partition('.')[0], None)\n"
    "    sys.path.insert(0, root)\n"
    "runpy.run_module(name, run_name='__main__', alter_sys=True)\n"
)


def module_command(name: str, *arguments: str) -> list[str]:
    """The command line that runs a module of ours, as ``python -m`` would in an empty folder.

    Args:
        name: dotted, such as ``launch.rank_main``.
        arguments: of the program.
    """
    return [sys.executable, "-P", "-c", _START, str(ROOT), name, *arguments]


def safe_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for such a process: interpreters that it starts leave the working directory alone too.

    Args:
        environment: to begin with; this process's if not given.
    """
    return {**(os.environ if environment is None else environment), "PYTHONSAFEPATH": "1"}


def alone_environment() -> dict[str, str]:
    """Variables for a command that starts ranks of its own, also inside a step of Slurm or a process of torchrun."""
    return {name: value for name, value in safe_environment().items() if name not in _OF_LAUNCHERS}
