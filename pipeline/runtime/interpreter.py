"""Starts modules of this project in new Python interpreters, independently of the working directory."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

_OF_LAUNCHERS = frozenset(
    (
        *(
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "SLURM_STEP_ID",
            "FOVEA_ATTEMPT",
            "FOVEA_KEY",
            "FOVEA_SNAPSHOTS",
            "FOVEA_STARTUP",
        ),
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


def module_argv(command: Sequence[str]) -> list[str] | None:
    """Returns the module and the arguments of a command line of :func:`module_command`; ``None`` for any other."""
    head = module_command("")[:-1]
    return list(command[len(head) :]) if list(command[: len(head)]) == head else None


def safe_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns environment variables for such a process: interpreters that it starts also ignore the working directory.

    Args:
        environment: variables to start from; by default those of this process.
    """
    return {**(os.environ if environment is None else environment), "PYTHONSAFEPATH": "1"}


def alone_environment() -> dict[str, str]:
    """Returns environment variables for a command that starts its own ranks, even inside a Slurm step or a torchrun process."""
    return {name: value for name, value in safe_environment().items() if name not in _OF_LAUNCHERS}


def end_process(code: int) -> NoReturn:
    """Ends this process like ``sys.exit``, but leaves its memory to the kernel.

    Threads that are not daemons are waited for, functions registered with ``atexit`` run, and output is flushed. Destroying the
    modules and objects of torch, DeepSpeed and DALI one by one takes 0.5 to 3 CPU seconds, and frees nothing that the kernel does
    not free at once; destructors of what is still referenced do not run.

    Args:
        code: exit status; 120 replaces 0 if output cannot be written, as in Python itself.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    gc.freeze()  # DALI's exit function collects garbage
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            code = code or 120
    os._exit(code & 0xFF)


def exit_code(stop: SystemExit) -> int:
    """The exit status that ``sys.exit`` would give; a text is printed, as Python does."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1
