"""Folders for snapshots in the memory of every node of a job, kept by a step of their own. Standard library only."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import host_memory
from pipeline.errors import LaunchError

STEP = "fovea-memory"  # name of the step, which outlives the ranks
_PATIENCE, _END = 120.0, 20.0  # seconds to begin and to end


@contextlib.contextmanager
def kept(run: Path, nodes: Sequence[str], python: str, environment: dict[str, str], log: Path) -> Iterator[str]:
    """Folders in the memory of the nodes within the context; yields the value of the ranks' variable.

    Args:
        run: the run directory.
        nodes: names of the nodes.
        python: the nodes' python.
        environment: variables of ``srun``.
        log: for the output of ``srun``.

    Raises:
        LaunchError: a node did not make its folder.
    """
    command = [
        *("srun", f"--job-name={STEP}", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"),
        *(
            "--cpus-per-task=1",
            "--mem=0",
            "--gres=none",
            "--overlap",
            "--no-kill",
            "--kill-on-bad-exit=0",
            "--wait=0",
            "--unbuffered",
        ),
        *(python, "-m", "launch.host_memory", str(run)),
    ]
    with log.open("ab") as errors:
        keepers = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    timer = threading.Timer(_PATIENCE, keepers.kill)
    timer.start()
    try:
        ready = 0
        assert keepers.stdout is not None
        for line in keepers.stdout:
            ready += line.count(host_memory.READY)  # srun may join what two nodes write at once into one line
            if ready >= len(nodes) or host_memory.FAILED in line:
                break
        timer.cancel()
        if not 0 < ready == len(nodes):
            raise LaunchError(
                f"{len(nodes) - ready} of {len(nodes)} nodes have made no folder in host memory",
                where=str(log),
                hint="Set checkpoint.snapshot_every=null, or see to /dev/shm on the nodes",
            )
        yield host_memory.of_all_nodes(run)
    finally:
        timer.cancel()
        try:
            keepers.communicate(timeout=_END)  # ends their input; a signal to srun would kill them before they have cleaned up
        except subprocess.TimeoutExpired:
            keepers.kill()
            keepers.wait()
