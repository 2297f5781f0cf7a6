"""Runs a measurement as a program of its own, which leaves no processes behind however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import ConfigError


def run_probe(
    argv: Sequence[str], environment: Mapping[str, str], *, limit: float, what: str, where: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a session of its own and returns its exit code and output.

    With all processes that it has started there it is killed after the time limit, and if an exception ends the wait.

    Args:
        argv: the program and its arguments.
        environment: its whole environment.
        limit: seconds.
        what: the measurement, for messages.
        where: the benchmark, for messages.
        cwd: its working directory; by default that of this process.

    Raises:
        ConfigError: it did not end within the limit.
    """
    quiet, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        argv, env=dict(environment), cwd=cwd, stdin=quiet, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            hint = "Use smaller sizes, or a machine with more free processors"
            raise ConfigError(f"{what} did not end within {limit:g} s", where=where, hint=hint) from None
    return subprocess.CompletedProcess(argv, process.returncode, output, errors)
