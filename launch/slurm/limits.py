"""Compares a cluster profile with its partition: what can never run is refused before it waits in the queue."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from launch.slurm import slurm_commands as tools
from launch.slurm.profile import ClusterProfile, seconds
from pipeline.errors import LaunchError
from pipeline.runtime.clock import clock

_GPUS = re.compile(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)")
_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


@dataclass(frozen=True)
class Node:
    """What a node has.

    Attributes:
        cpus: CPUs as Slurm counts them.
        memory: MB.
        gpus: GPUs of all types.
    """

    cpus: int
    memory: int
    gpus: int


@dataclass(frozen=True)
class Partition:
    """What a partition has and admits; ``None`` for no limit.

    Attributes:
        name: its name.
        seconds: longest time limit of a job.
        most: most nodes of a job.
        nodes: its nodes.
        qos: the quality of service whose limits it has; empty for none.
    """

    name: str
    seconds: int | None = None
    most: int | None = None
    nodes: tuple[Node, ...] = field(default_factory=tuple)
    qos: str = ""

    def __str__(self) -> str:
        """One line: nodes, CPUs, memory, GPUs, time limit."""

        def span(values: list[int]) -> str:
            return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"

        limit = "unlimited" if self.seconds is None else clock(self.seconds)
        if not self.nodes:
            return f"partition {self.name}: no nodes, time {limit}"
        cpus, memory, gpus = (span(sorted(getattr(node, name) for node in self.nodes)) for name in ("cpus", "memory", "gpus"))
        most = f", {self.most} per job" if self.most is not None and self.most < len(self.nodes) else ""
        return (
            f"partition {self.name}: {len(self.nodes)} nodes{most}, {cpus} CPUs, {memory} MB and {gpus} GPUs each, time {limit}"
        )


def partition(name: str | None) -> Partition | None:
    """A partition, or the one in which jobs run that name none; ``None`` where Slurm has no default.

    Raises:
        LaunchError: there is no such partition, or Slurm does not answer.
    """
    rows = [tools.pairs(line) for line in tools.call("scontrol", "show", "partition", "--oneliner").splitlines()]
    names = [row["PartitionName"] for row in rows if "PartitionName" in row]
    chosen = [row for row in rows if row.get("PartitionName") == name or (name is None and row.get("Default") == "YES")]
    if name is not None and names and not chosen:
        raise LaunchError(f"there is no partition {name}", where="partition", hint=f"Choose one of {', '.join(sorted(names))}")
    if not chosen:
        return None
    own = chosen[0]["PartitionName"]
    lines = tools.call("sinfo", "--noheader", "--Node", f"--partition={own}", "--format=%c|%m|%G").splitlines()
    most = chosen[0].get("MaxNodes", "")
    qos = chosen[0].get("QoS", "N/A")
    return Partition(
        own,
        _limit(chosen[0]),
        int(most) if most.isdecimal() else None,
        tuple(map(_node, lines)),
        "" if qos in ("N/A", "(null)") else qos.lower(),
    )


def never_runs(profile: ClusterProfile, available: Partition) -> list[str]:
    """Why a job can never run in a partition, one sentence per reason; empty if it can.

    Args:
        profile: the cluster profile.
        available: its partition.
    """
    reasons = []
    if available.seconds is not None and profile.seconds > available.seconds:
        reasons.append(f"time {profile.time} exceeds the limit of {clock(available.seconds)}")
    most = min(len(available.nodes), available.most if available.most is not None else len(available.nodes))
    if profile.all_nodes > most:
        reasons.append(f"nodes {profile.all_nodes} exceeds {most}")
    required = {
        "cpus": (profile.tasks_per_node * profile.cpus_per_rank, "CPUs"),
        "gpus": (profile.gpus_per_node, "GPUs"),
        "memory": (megabytes(profile.memory), "MB of memory"),
    }
    for name, (number, what) in required.items():
        enough = sum(getattr(node, name) >= number for node in available.nodes)
        if enough < min(profile.all_nodes, most):
            reasons.append(f"{number} {what} per node are available on {enough} of {profile.all_nodes} nodes")
    return reasons


def _limit(facts: Mapping[str, str]) -> int | None:
    try:
        return seconds(facts.get("MaxTime", "UNLIMITED"))
    except ValueError:
        return None


def _node(line: str) -> Node:
    cpus, memory, gres = [*line.split("|"), "", "", ""][:3]
    return Node(_number(cpus), _number(memory), gpus_of(gres))


def gpus_of(gres: str) -> int:
    """Number of GPUs in a list of generic resources, such as ``gpu:a100:8(S:0-1)``."""
    return sum(int(number) for _, number in _GPUS.findall(gres))


def gpu_types_of(gres: str) -> list[str]:
    """Types of the GPUs in a list of generic resources."""
    return sorted({kind for kind, _ in _GPUS.findall(gres) if kind})


def _number(text: str) -> int:
    """A number of ``sinfo``, which marks the least of several nodes with a plus."""
    least = text.strip().rstrip("+")
    return int(least) if least.isdecimal() else 0


def megabytes(text: str) -> int:
    """Memory in the format of sbatch, in MB; 0 for all of a node's."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.upper())
    return round(int(match[1]) * _UNITS[match[2] or "M"]) if match else 0
