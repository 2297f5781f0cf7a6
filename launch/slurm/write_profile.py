"""Writes a cluster profile from what Slurm and this machine say; what they do not know becomes commented lines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from launch.slurm.profile import load, seconds
from launch.slurm.site import NodeFacts, Site
from pipeline.errors import ConfigError, LaunchError
from pipeline.runtime.clock import clock
from pipeline.untrusted import printable

_USUAL = 24 * 3600  # time of an attempt where the partition admits more, seconds


def write(site: Site, file: Path, partition: str | None) -> str:
    """Write a profile and check that it can be read; returns a line about it.

    Args:
        site: what Slurm and this machine say.
        file: a new file.
        partition: its partition; by default Slurm's.

    Raises:
        ConfigError: the file exists, cannot be written, or is not called .yaml.
        LaunchError: there is no such partition, or it has no nodes.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError("must end with .yaml", where=str(file), hint="Name a file such as site.yaml")
    text = profile_text(site, partition)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x") as out:
            out.write(text)
    except FileExistsError:
        raise ConfigError(
            "exists already", where=str(file), hint="Choose another name, or compare it with `fovea doctor -c`"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot be written ({error.strerror})", where=str(file), hint="Choose another folder") from error
    load(str(file))
    return f"wrote {file}; look through it, then: fovea doctor -c {file}"


def profile_text(site: Site, partition: str | None) -> str:
    """A profile as YAML.

    Args:
        site: what Slurm and this machine say.
        partition: its partition; by default Slurm's, else the one with the most nodes.

    Raises:
        LaunchError: there is no such partition, or it has no nodes.
    """
    sizes = Counter(name for node in site.nodes for name in node.partitions)
    name = partition or site.default() or next((one for one, _ in sizes.most_common(1)), None)
    if name is None or name not in site.partitions:
        if not site.partitions:
            raise LaunchError("there are no partitions", where="Slurm", hint="Run this on a login node")
        known = ", ".join(sorted(site.partitions))
        raise LaunchError(f"there is no partition {name}", where="--partition", hint=f"Choose one of {known}")
    facts, nodes = site.partitions[name], _alike(site.of(name))
    if not nodes:
        raise LaunchError(f"partition {name} has no nodes", where="--partition", hint="Choose another")
    gpus, cpus, memory = nodes[0].gpus, min(node.cpus for node in nodes), min(node.memory for node in nodes)
    limit = _limit(facts)
    time = min(_USUAL, limit) if limit is not None else _USUAL
    types = ", ".join(sorted(set().union(*(node.gpu_types for node in nodes))))
    version, cluster = site.settings.get("SLURM_VERSION", "?"), site.settings.get("ClusterName", "?")
    preemption = facts.get("PreemptMode") or site.settings.get("PreemptMode", "OFF")
    paths = sorted({"/tmp", "/var/tmp", "/dev/shm", site.settings.get("TmpFS") or "/tmp"})
    rows = [
        ("nodes: 1", f"at most {_most_nodes(facts, nodes)}"),
        (f"gpus_per_node: {gpus}", types),
        (f"cpus_per_rank: {max(cpus // (gpus or 1), 1)}", f"{cpus} CPUs per node, {gpus or 1} ranks"),
        ('memory: "0"', f"all of a node: {memory} MB"),
        (
            f"time: {json.dumps(_sbatch_time(time))}",
            f"at most {clock(limit)}" if limit is not None else "the partition has no limit",
        ),
        (f"checkpoint_lead_time: {min(300, max(time // 4, 1))}", "seconds; longer than a step and two checkpoints"),
        (f"partition: {json.dumps(name)}", ""),
        ("requeue_mode: successor", f"PreemptMode={preemption}"),
        (f"local_paths: {json.dumps(paths)}", ""),
        _preflight(nodes),
    ]
    lines = [
        "# Written by `fovea doctor --write` from what Slurm and this machine say; lines that begin with # they do not know.",
        f"# Slurm {version}, cluster {cluster}, partition {name}: {len(site.of(name))} nodes.",
        *_others(site, name, nodes),
        "",
        *map(_commented, rows),
        "",
        *(f"# {_commented(row)}" for row in _unknown(site, nodes, has_gpus=bool(gpus))),
    ]
    return "\n".join(printable(line.rstrip()) for line in lines) + "\n"


def _alike(nodes: tuple[NodeFacts, ...]) -> list[NodeFacts]:
    """The nodes with the most frequent number of GPUs."""
    if not nodes:
        return []
    number = Counter(node.gpus for node in nodes).most_common(1)[0][0]
    return [node for node in nodes if node.gpus == number]


def _others(site: Site, name: str, nodes: list[NodeFacts]) -> list[str]:
    """Comments about other partitions, and about nodes of this one that have other GPUs."""
    rest = len(site.of(name)) - len(nodes)
    lines = [f"# {rest} of its nodes have another number of GPUs: with `constraint` you can select them."] if rest else []
    others = [f"{other} ({len(site.of(other))} nodes)" for other in sorted(site.partitions) if other != name]
    return [*lines, *([f"# Other partitions: {', '.join(others)}."] if others else [])]


def _preflight(nodes: list[NodeFacts]) -> tuple[str, str]:
    known = [node.tmp for node in nodes if node.tmp]
    if not known:
        return "# preflight: {disk_gb: 50}", "free space that the run needs; Slurm does not know the nodes' disks"
    return f"preflight: {{disk_gb: {min(50, min(known) // 4096)}}}", f"{min(known) // 1024} GB of temporary disk per node"


def _unknown(site: Site, nodes: list[NodeFacts], *, has_gpus: bool) -> list[tuple[str, str]]:
    accounts = sorted(site.accounts or {})
    qualities = sorted({one for own in (site.accounts or {}).values() for one in own})
    features = sorted(set().union(*(node.features for node in nodes)))
    up = [one for one in site.interfaces if one.up]
    first = min(up, key=lambda one: not one.infiniband, default=None)
    here = ", ".join(f"{one.name}{' (InfiniBand)' if one.infiniband else ''}" for one in up) or "none"
    gpu = [("gpu_memory_gb: 80", ""), ("gpu_tflops: 989", "dense bf16 of an H100 SXM"), ("gpu_hour_price: 2.0", "")]
    return [
        (f"account: {accounts[0] if accounts else 'my-project'}", f"yours: {', '.join(accounts)}" if accounts else ""),
        (f"qos: {qualities[0] if qualities else 'normal'}", f"yours: {', '.join(qualities)}" if qualities else ""),
        (f"constraint: {features[0] if features else 'a-feature'}", ", ".join(features) or "the nodes have none"),
        ("exclusive: true", "false shares nodes with other jobs; then set memory"),
        ("host_python: python3", "3.9 or newer on the nodes"),
        ("setup: [module load cuda]", ""),
        ("environment:", ""),
        (f"  NCCL_SOCKET_IFNAME: {first.name if first else 'ib0'}", f"connected on this machine: {here}; nodes may have others"),
        ("container:", "needs the pyxis plugin"),
        ("  image: /shared/images/fovea.sqsh", ""),
        ("  mounts: [/shared:/shared]", ""),
        ("notify: {email_to: [me@lab.org], smtp: mail.lab.org:25, smtp_security: none}", ""),
        *(gpu if has_gpus else []),
    ]


def _most_nodes(facts: object, nodes: list[NodeFacts]) -> int:
    limit = facts.get("MaxNodes", "") if isinstance(facts, dict) else ""
    return min(len(nodes), int(limit)) if limit.isdecimal() else len(nodes)


def _limit(facts: object) -> int | None:
    try:
        return seconds(facts.get("MaxTime", "UNLIMITED")) if isinstance(facts, dict) else None
    except ValueError:
        return None


def _sbatch_time(number: int) -> str:
    hours, rest = divmod(number, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _commented(row: tuple[str, str]) -> str:
    return f"{row[0]:<34}# {row[1]}" if row[1] else row[0]
