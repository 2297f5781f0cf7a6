"""Sends the trackers of a run that failed the state in which it ended, which its ranks could not send.

Standard library only; the trackers' libraries are imported in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys

from pipeline.runtime.interpreter import alone_environment, module_command
from pipeline.runtime.run_directory import RunDirectory

MODULE = "launch.cli.send_end"  # its argument is the run directory
LIMIT = 60.0  # of the whole command, seconds


def is_tracked(run: RunDirectory) -> bool:
    """Whether a tracker knows the run.

    Args:
        run: the run directory.
    """
    return any(run.tracking.glob("cursor*.json"))


def send(run: RunDirectory) -> None:
    """Informs the trackers of a run on this host; what they do not accept in time is sent by the next attempt.

    Args:
        run: the run directory.
    """
    if not is_tracked(run):
        return
    command = module_command(MODULE, str(run.path))
    try:
        done = subprocess.run(
            command, env=alone_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        done = None
    if done is None or done.returncode:
        print("fovea: the trackers have not received the end of the run yet; the next attempt sends it", file=sys.stderr)
