"""Faults of a cluster: time limit, preemption, ``scancel``, requeue, a lost node, a killed rank; on a real Slurm of two nodes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from typing import Any

from pipeline.bench.chaos.kinds import Case, Kind
from pipeline.bench.chaos.runs import Run, failed, kill, until
from pipeline.bench.chaos.site import RANKS, Site, helper

STEPS = 80
_URGENT = "#!/bin/bash\n#SBATCH --partition=urgent --nodes=2 --exclusive --output=/dev/null\nsleep 2\n"


class SlurmRun(Run):
    """A run that is submitted and goes on by itself; its user submits it again when it has stopped.

    Args:
        cluster: the Slurm of the tests.
    """

    cluster: Any = None

    def start(self) -> None:
        """Submit it."""
        if not self.launches:
            self.progress.start()
        self.launches.append(time.monotonic())
        with self.log.open("ab") as log:
            done = subprocess.run(self.command, env=self.environment, cwd=self.root, stdout=log, stderr=log, check=False)
        if done.returncode:
            raise failed(f"it was not submitted: {self.reported()}")

    def state(self) -> str:
        """Its final state; empty while it has not ended."""
        with contextlib.suppress(OSError, ValueError):
            return str(json.loads((self.directory / "final_state.json").read_text()).get("state", ""))
        return ""

    def running(self) -> bool:
        """Whether it has not ended."""
        return not self.state()

    def ended(self) -> bool:
        """Whether it has come to its end; waits until it has ended and left the queue."""
        self.watch(self.state)
        until(lambda: not self.queue(), "a job of an ended run is left in the queue", 120, pause=0.3)
        return self.state() == "finished"

    def queue(self) -> str:
        """The user's jobs."""
        return str(self.cluster.call("squeue", "--me", "-h", "-o", "%i", check=False)).strip()

    def job(self) -> int:
        """The job that trains now."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return int(json.loads((self.directory / "live.json").read_text())["job"])
        return 0

    def close(self) -> None:
        """Cancel what is still in the queue."""
        self.cluster.call("scancel", "--me", check=False)
        until(lambda: not self.queue(), "a cancelled job is left in the queue", 120, pause=0.3)
        super().close()


def _missing(site: Site) -> str:
    lacking = helper("slurm").missing()
    return f"Slurm is not installed ({', '.join(lacking)})" if lacking else ""


def _time_limit(case: Case, run: Run) -> str:
    assert isinstance(run, SlurmRun)
    run.cluster.call("scancel", "--batch", "-s", "USR2", str(run.job()))
    return "the signal that Slurm sends before the limit"


def _preempt(case: Case, run: Run) -> str:
    assert isinstance(run, SlurmRun)
    urgent = case.folder / "urgent.sh"
    urgent.write_text(_URGENT)
    run.cluster.call("sbatch", str(urgent))
    return "an urgent job of 2 s took both nodes"


def _scancel(case: Case, run: Run) -> str:
    assert isinstance(run, SlurmRun)
    run.cluster.call("scancel", str(run.job()))
    return "scancel JOB"


def _requeue(case: Case, run: Run) -> str:
    assert isinstance(run, SlurmRun)
    run.cluster.call("scontrol", "requeue", str(run.job()))
    return "scontrol requeue JOB"


def _node(case: Case, run: Run) -> str:
    assert isinstance(run, SlurmRun)
    seconds = case.rng.uniform(0, 5)
    run.cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=chaos")
    time.sleep(seconds)
    run.cluster.call("scontrol", "update", "nodename=n2", "state=resume", check=False)  # refused if it came back by itself
    return f"node n2 down, back after {seconds:.1f} s"


def _kill_rank(case: Case, run: Run) -> str:
    number = case.rng.randrange(RANKS)
    return f"rank {number} killed" if kill(run.rank(number)) else ""


def _kind(name: str, title: str, inject: Any, margin: int = 20) -> Kind:
    return Kind(name, title, inject, slurm=True, steps=STEPS, margin=margin, missing=_missing)


KINDS = (
    _kind("slurm-none", "Slurm: nothing (control)", lambda case, run: "nothing was done"),
    _kind("slurm-kill", "Slurm: SIGKILL of a rank", _kill_rank),
    _kind("slurm-limit", "Slurm: time limit", _time_limit),
    _kind("slurm-preempt", "Slurm: preemption", _preempt, margin=45),
    _kind("slurm-scancel", "Slurm: scancel", _scancel),
    _kind("slurm-requeue", "Slurm: requeue by an administrator", _requeue),
    _kind("slurm-node", "Slurm: a node is lost", _node, margin=25),
)
