"""What Slurm and this machine say about a site: partitions, nodes, limits, accounts, network interfaces."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launch.slurm import limits
from launch.slurm import slurm_commands as tools
from pipeline.errors import LaunchError

_INFINIBAND = "32"  # ARPHRD_INFINIBAND
_VIRTUAL = ("lo", "docker", "veth", "br-", "virbr", "cni", "flannel", "cali", "tun", "tap", "dummy")


@dataclass(frozen=True)
class NodeFacts:
    """A node as ``scontrol show node`` describes it.

    Attributes:
        name: its name.
        cpus: CPUs as Slurm counts them.
        memory: MB.
        tmp: size of its temporary disk, MB; 0 where Slurm does not know it.
        gpus: GPUs of all types.
        gpu_types: their types.
        features: what a job may require by ``constraint``.
        partitions: names.
    """

    name: str
    cpus: int
    memory: int
    tmp: int
    gpus: int
    gpu_types: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    partitions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Interface:
    """A network interface of this machine.

    Attributes:
        name: its name.
        up: whether it is connected.
        infiniband: whether it is one of InfiniBand (IP over IB).
    """

    name: str
    up: bool
    infiniband: bool


@dataclass(frozen=True)
class Site:
    """A site.

    Attributes:
        settings: ``scontrol show config``.
        partitions: facts of each partition, by name.
        nodes: all nodes.
        accounts: accounts and qualities of service that this user may use; ``None`` where Slurm keeps no accounts,
            empty where they are not known.
        reservations: names.
        interfaces: network interfaces of this machine, which may not be those of the nodes.
    """

    settings: Mapping[str, str]
    partitions: Mapping[str, Mapping[str, str]]
    nodes: tuple[NodeFacts, ...]
    accounts: Mapping[str, frozenset[str]] | None = None
    reservations: frozenset[str] = frozenset()
    interfaces: tuple[Interface, ...] = field(default_factory=tuple)

    def default(self) -> str | None:
        """The partition of jobs that name none."""
        return next((name for name, facts in self.partitions.items() if facts.get("Default") == "YES"), None)

    def of(self, partition: str | None) -> tuple[NodeFacts, ...]:
        """The nodes of a partition; all nodes for ``None``."""
        return tuple(node for node in self.nodes if partition is None or partition in node.partitions)


def ask() -> Site:
    """Ask Slurm and this machine.

    Raises:
        LaunchError: Slurm does not answer.
    """
    rows = [tools.pairs(line) for line in tools.call("scontrol", "show", "partition", "--oneliner").splitlines()]
    partitions = {row["PartitionName"]: row for row in rows if "PartitionName" in row}
    nodes = [tools.pairs(line) for line in tools.call("scontrol", "show", "node", "--oneliner").splitlines()]
    reservations = [tools.pairs(line) for line in _quiet("scontrol", "show", "reservation", "--oneliner").splitlines()]
    settings = tools.settings()
    return Site(
        settings=settings,
        partitions=partitions,
        nodes=tuple(_node(row) for row in nodes if "NodeName" in row),
        accounts=_accounts() if tools.keeps_accounts(settings) else None,
        reservations=frozenset(row["ReservationName"] for row in reservations if "ReservationName" in row),
        interfaces=interfaces(Path("/sys/class/net")),
    )


def interfaces(folder: Path) -> tuple[Interface, ...]:
    """Network interfaces that are not virtual, by name.

    Args:
        folder: ``/sys/class/net``.
    """
    real = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(_VIRTUAL):
                real.append(Interface(path.name, _text(path / "operstate") == "up", _text(path / "type") == _INFINIBAND))
    return tuple(real)


def _node(row: Mapping[str, str]) -> NodeFacts:
    gres = row.get("Gres", "")
    return NodeFacts(
        row["NodeName"],
        _number(row.get("CPUTot", "")),
        _number(row.get("RealMemory", "")),
        _number(row.get("TmpDisk", "")),
        limits.gpus_of(gres),
        frozenset(limits.gpu_types_of(gres)),
        frozenset(_list(row.get("AvailableFeatures", ""))),
        frozenset(_list(row.get("Partitions", ""))),
    )


def _accounts() -> dict[str, frozenset[str]]:
    """Accounts of this user, each with its qualities of service; empty where ``sacctmgr`` names none."""
    if (user := tools.user()) is None:
        return {}
    text = _quiet("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", "format=account,qos")
    rows = [line.split("|") for line in text.splitlines()]
    return {row[0]: frozenset(_list(row[1])) for row in rows if len(row) == 2 and row[0]}


def _quiet(*argv: str) -> str:
    try:
        return tools.call(*argv, limit=20)
    except LaunchError:
        return ""


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part and part not in ("(null)", "N/A")]
