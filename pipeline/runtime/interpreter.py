"""Starts modules of this project in new Python interpreters, independently of the working directory."""

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

# Finds the module as ``python -m`` does, but never in the working directory, and in the location where this process found it: a
# directory of this project that comes later on the path than another package of the same name is put first.
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
    """Returns the command line that runs a module, as ``python -m`` would in an empty directory.

    Args:
        name: dotted name, such as ``launch.rank_main``.
        arguments: arguments of the program.
    """
    return [sys.executable, "-P", "-c", _START, str(ROOT), name, *arguments]


def safe_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns environment variables for such a process: interpreters that it starts also ignore the working directory.

    Args:
        environment: variables to start from; by default those of this process.
    """
    return {**(os.environ if environment is None else environment), "PYTHONSAFEPATH": "1"}


def alone_environment() -> dict[str, str]:
    """Returns environment variables for a command that starts its own ranks, even inside a Slurm step or a torchrun process."""
    return {name: value for name, value in safe_environment().items() if name not in _OF_LAUNCHERS}
