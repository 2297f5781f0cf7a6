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
from typing import IO

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")

# Another version of Slurm than the installed one: a folder with its programs in bin and its plugins in plugins. Further options
# of slurm.conf for all tests stand in FOVEA_TEST_SLURM_OPTIONS, as KEY=VALUE.
OTHER = os.environ.get("FOVEA_TEST_SLURM", "")


def search_path() -> str:
    """Where programs are looked for, those of daemons too."""
    return f"{OTHER}/bin:" * bool(OTHER) + f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing(*further: str) -> list[str]:
    """Programs of Slurm that this machine lacks; Debian: ``apt install slurmctld slurmd slurm-client munge``."""
    return [name for name in (*NEEDED, *further) if shutil.which(name, path=search_path()) is None]


NEEDS_SLURM = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm: {missing()}; apt install slurmctld slurmd slurm-client munge"),
]
ACCOUNTING = ("slurmdbd", "sacctmgr", "sacct", "mariadbd", "mariadb-install-db")
NEEDS_ACCOUNTS = [
    *NEEDS_SLURM,
    pytest.mark.skipif(
        bool(missing(*ACCOUNTING)),
        reason=f"slurmdbd is not installed: {missing(*ACCOUNTING)}; apt install slurmdbd mariadb-server-core mariadb-client-core",
    ),
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
        **({"PluginDir": f"{OTHER}/plugins"} if OTHER else {}),
        **({} if defaults else _SHORT),
        **extra,
        **dict(word.split("=", 1) for word in os.environ.get("FOVEA_TEST_SLURM_OPTIONS", "").split()),
    }
    lines = [f"{key}={value}" for key, value in options.items()]
    for name, port in zip(names, ports, strict=True):
        lines.append(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4000 State=UNKNOWN")
    file = folder / "slurm.conf"
    file.write_text("\n".join([*lines, *partitions]) + "\n")
    return file


class _Database:
    """MariaDB and slurmdbd, with data, socket and ports of their own.

    Args:
        folder: the cluster's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "database"
        self.port, self._sql = _ports(2)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def start(self, slurm: Cluster, commands: list[str]) -> None:
        """Starts both, and gives ``sacctmgr`` commands."""
        self._folder.mkdir()
        data, me, environment = self._folder / "data", getpass.getuser(), slurm.environment
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={me}", "--skip-test-db"]
        subprocess.run(install, env=environment, check=True, capture_output=True, timeout=600)
        statements = ("CREATE DATABASE slurm;", "GRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1' IDENTIFIED BY 'x';")
        (self._folder / "first.sql").write_text("\n".join(statements) + "\n")  # one on each line
        words = ["mariadbd", "--no-defaults", f"--datadir={data}", f"--user={me}", f"--socket={self._folder}/socket"]
        words += [
            f"--port={self._sql}",
            "--bind-address=127.0.0.1",
            f"--init-file={self._folder}/first.sql",
            "--skip-name-resolve",
        ]
        words += [
            f"--pid-file={self._folder}/mariadbd.pid",
            "--innodb-buffer-pool-size=16M",
            "--innodb-flush-log-at-trx-commit=0",
        ]
        self._log = (slurm.folder / "log" / "mariadbd.log").open("wb")
        self._process = subprocess.Popen(words, env=environment, stdout=self._log, stderr=self._log)
        self._until_open(self._sql, slurm)
        conf = slurm.folder / "slurmdbd.conf"
        options = {
            **{"AuthType": "auth/munge", "AuthInfo": f"socket={slurm.folder}/munge/sock", "DbdHost": "localhost"},
            **{"DbdAddr": "127.0.0.1", "DbdPort": self.port, "SlurmUser": me, "LogFile": f"{slurm.folder}/log/slurmdbd.log"},
            **{"PidFile": f"{slurm.folder}/run/slurmdbd.pid", "StorageType": "accounting_storage/mysql"},
            **{"StorageHost": "127.0.0.1", "StoragePort": self._sql, "StorageUser": "slurm", "StoragePass": "x"},
            **{"StorageLoc": "slurm", **({"PluginDir": f"{OTHER}/plugins"} if OTHER else {})},
        }
        conf.touch(mode=0o600)
        conf.write_text("".join(f"{key}={value}\n" for key, value in options.items()))
        subprocess.run(["slurmdbd"], env=environment, check=True, capture_output=True, timeout=300)
        self._until_open(self.port, slurm)
        for command in ("add cluster tests", *commands):
            slurm.call("sacctmgr", "-i", *command.split())

    def stop(self) -> None:
        """Ends the database."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._log is not None:
            self._log.close()

    @staticmethod
    def _until_open(port: int, slurm: Cluster) -> None:
        end = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                return
            assert time.monotonic() < end, f"nobody listens\n{slurm.tails()}"
            time.sleep(0.1)


@contextlib.contextmanager
def cluster(
    folder: Path,
    *,
    extra: dict[str, str] | None = None,
    partitions: list[str] | None = None,
    defaults: bool = False,
    nodes: int = 2,
    accounts: list[str] | None = None,
) -> Iterator[Cluster]:
    """Starts the daemons, waits until all nodes are idle, and ends everything afterwards.

    Args:
        folder: everything it writes.
        extra: further options of ``slurm.conf``.
        partitions: lines of ``slurm.conf``; by default one partition of all nodes.
        nodes: how many, called n1 and so on.
        defaults: keep Slurm's own ``cred_expire``, ``KillWait`` and ``MinJobAge`` instead of short ones.
        accounts: commands of ``sacctmgr``; the cluster then keeps accounts in a database of its own, and enforces them.
    """
    names = [f"n{number + 1}" for number in range(nodes)]
    for name in ("state", "log", "run", "munge", *(f"spool.{name}" for name in names)):
        (folder / name).mkdir(parents=True)
    for path in (folder, folder / "munge"):
        path.chmod(0o755)  # another user's commands ask munge too
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    partitions = partitions or ["PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"]
    extra = dict(extra or {})
    database = _Database(folder) if accounts is not None else None
    if database is not None:
        extra |= {"AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageHost": "127.0.0.1"}
        extra |= {"AccountingStoragePass": f"{folder}/munge/sock"}  # where commands find munge for slurmdbd
        extra |= {"AccountingStoragePort": str(database.port), "AccountingStorageEnforce": "associations,limits,qos"}
    conf = _write(folder, extra, partitions, names, defaults=defaults)
    stray = ("SLURM_", "SRUN_", "SBATCH_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(stray)}
    environment |= {"SLURM_CONF": str(conf), "PATH": search_path()}
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
            if database is not None and command[0] == "slurmctld":
                database.start(made, accounts or [])
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        end = time.monotonic() + 900
        while made.call("sinfo", "-h", "-N", "-o", "%T", check=False).split().count("idle") < nodes:
            assert time.monotonic() < end, f"the nodes are not idle\n{made.tails()}"
            time.sleep(0.1)
        yield made
    finally:
        made.call("scancel", "--me", check=False)
        time.sleep(1)
        for name in ("slurmd", "slurmctld", "slurmdbd", "munged"):
            for pid in made.pids(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if name == "slurmd" else signal.SIGTERM)
        if database is not None:
            database.stop()
