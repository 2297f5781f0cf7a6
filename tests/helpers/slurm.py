"""A real Slurm of two nodes on this machine, private to the tests: its own keys, ports, folders and daemons."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")


def missing() -> list[str]:
    """Programs of Slurm that this machine lacks; Debian: ``apt install slurmctld slurmd slurm-client munge``."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in NEEDED if shutil.which(name, path=path) is None]


NEEDS_SLURM = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm: {missing()}; apt install slurmctld slurmd slurm-client munge"),
]
PREEMPTION = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}


def preempting(grace: int = 0) -> list[str]:
    """A default partition, one whose preempted jobs are cancelled, and one that preempts both; ``grace`` in seconds."""
    return [
        f"PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}",
        "PartitionName=cancelling Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL",
        "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
    ]


@dataclass(frozen=True)
class Cluster:
    """A running Slurm.

    Attributes:
        folder: everything it writes.
        environment: variables with which its commands find it.
    """

    folder: Path
    environment: dict[str, str]

    def call(self, *argv: str, check: bool = True) -> str:
        """What one of its commands says."""
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=600, check=False)
        if check and done.returncode:
            raise AssertionError(f"{argv}: {done.stderr}{done.stdout}")
        return done.stdout + done.stderr

    def state(self, job: int) -> str:
        """A job's state."""
        text = self.call("scontrol", "show", "job", "-o", str(job), check=False)
        return next((word[9:] for word in text.split() if word.startswith("JobState=")), "GONE")

    def wait(self, job: int, *states: str, seconds: float = 1200) -> str:
        """Waits until a job is in one of these states; in which."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, f"job {job} is {state} after {seconds:.0f} s; wanted {states}\n{self.tails()}"
            time.sleep(0.3)
        return state

    def tails(self, lines: int = 15) -> str:
        """The ends of the daemons' logs."""
        logs = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) for log in logs)

    def pids(self, name: str) -> list[int]:
        """Process numbers from the daemons' own files."""
        found = []
        for file in (self.folder / "run").glob(f"{name}*.pid"):
            with contextlib.suppress(ValueError):
                found.append(int(file.read_text()))
        return found


def _ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


# With Slurm's own values (cred_expire 120 s, KillWait 30 s, MinJobAge 300 s) most tests would only wait.
_SHORT = {"KillWait": "10", "MinJobAge": "3600"}


def _write(folder: Path, extra: dict[str, str], partitions: list[str], names: list[str], *, defaults: bool) -> Path:
    me, host = getpass.getuser(), socket.gethostname().split(".")[0]
    control, *ports = _ports(1 + len(names))
    options = {
        "ClusterName": "tests",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": me,
        "SlurmdUser": me,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge/sock" + ("" if defaults else ",cred_expire=5"),
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool.%n",
        "SlurmctldPidFile": f"{folder}/run/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/run/slurmd.%n.pid",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
        "SlurmctldPort": str(control),
        "ProctrackType": "proctrack/pgid",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "AccountingStorageType": "accounting_storage/none",
        "SlurmdParameters": "config_overrides",
        "SchedulerParameters": "sched_interval=1,batch_sched_delay=0",
        "MpiDefault": "none",
        "ReturnToService": "2",
        "SlurmdTimeout": "10",
        "JobRequeue": "1",
        "UnkillableStepTimeout": "600",  # a busy machine must not drain a node
        **({} if defaults else _SHORT),
        **extra,
    }
    lines = [f"{key}={value}" for key, value in options.items()]
    for name, port in zip(names, ports, strict=True):
        lines.append(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4000 State=UNKNOWN")
    file = folder / "slurm.conf"
    file.write_text("\n".join([*lines, *partitions]) + "\n")
    return file


@contextlib.contextmanager
def cluster(
    folder: Path,
    *,
    extra: dict[str, str] | None = None,
    partitions: list[str] | None = None,
    defaults: bool = False,
    nodes: int = 2,
) -> Iterator[Cluster]:
    """Starts the daemons, waits until all nodes are idle, and ends everything afterwards.

    Args:
        folder: everything it writes.
        extra: further options of ``slurm.conf``.
        partitions: lines of ``slurm.conf``; by default one partition of all nodes.
        nodes: how many, called n1 and so on.
        defaults: keep Slurm's own ``cred_expire``, ``KillWait`` and ``MinJobAge`` instead of short ones.
    """
    names = [f"n{number + 1}" for number in range(nodes)]
    for name in ("state", "log", "run", "munge", *(f"spool.{name}" for name in names)):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    partitions = partitions or ["PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"]
    conf = _write(folder, extra or {}, partitions, names, defaults=defaults)
    stray = ("SLURM_", "SRUN_", "SBATCH_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(stray)}
    environment |= {"SLURM_CONF": str(conf), "PATH": f"{environment.get('PATH', '')}:/usr/sbin:/sbin"}
    made = Cluster(folder, environment)
    munge = folder / "munge"
    daemons = [
        *(["munged", "--force", f"--socket={munge}/sock", f"--key-file={key}", f"--pid-file={folder}/run/munged.pid"],),
        ["slurmctld", "-c"],
        *(["slurmd", "-N", name] for name in names),
    ]
    daemons[0] += [f"--log-file={folder}/log/munged.log", f"--seed-file={munge}/seed"]
    try:
        for command in daemons:
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        end = time.monotonic() + 900
        while made.call("sinfo", "-h", "-N", "-o", "%T", check=False).split().count("idle") < nodes:
            assert time.monotonic() < end, f"the nodes are not idle\n{made.tails()}"
            time.sleep(0.1)
        yield made
    finally:
        made.call("scancel", "--me", check=False)
        time.sleep(1)
        for name in ("slurmd", "slurmctld", "munged"):
            for pid in made.pids(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if name == "slurmd" else signal.SIGTERM)
