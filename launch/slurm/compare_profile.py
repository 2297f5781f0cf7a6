"""Compares every field of a cluster profile with what Slurm and this machine say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from launch.slurm import limits
from launch.slurm import slurm_commands as tools
from launch.slurm.profile import ClusterProfile, seconds
from launch.slurm.site import NodeFacts, Site
from pipeline.runtime.clock import clock
from pipeline.untrusted import printable

Finding = tuple[str, str, str]  # ok, note or bad; what; advice
Answer = tuple[str, str] | tuple[str, str, str] | None
_UNLIMITED = (None, "UNLIMITED", "INFINITE", "NONE", "(null)", "ALL", "N/A", "")


class _Comparison:
    """One method for each field that Slurm or this machine knows about; ``None`` where there is nothing to say."""

    def __init__(self, profile: ClusterProfile, site: Site) -> None:
        self.profile, self.site = profile, site
        name = profile.partition or site.default()
        self.partition = site.partitions.get(name or "", {})
        self.name = name
        self.nodes_here = site.of(name)

    def _of_nodes(self, what: str, needed: int, value: Callable[[NodeFacts], int]) -> Answer:
        """Whether enough nodes have as much as is needed."""
        if not self.nodes_here:
            return None
        numbers = sorted(value(node) for node in self.nodes_here)
        enough = sum(number >= needed for number in numbers)
        shown = str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"
        state = "ok" if enough >= self.profile.all_nodes else "bad"
        return state, f"{needed} {what} per node; {enough} of {len(numbers)} nodes have them (each has {shown})"

    def nodes(self) -> Answer:
        limit = self.partition.get("MaxNodes")
        most = min(len(self.nodes_here), int(limit) if limit is not None and limit.isdecimal() else len(self.nodes_here))
        return ("ok" if self.profile.all_nodes <= most else "bad"), f"{self.profile.all_nodes} of at most {most}"

    def spare_nodes(self) -> Answer:
        return "ok", f"{self.profile.spare_nodes}, so that the job has {self.profile.all_nodes} nodes"

    def gpus_per_node(self) -> Answer:
        most = max((node.gpus for node in self.nodes_here), default=0)
        answer = self._of_nodes("GPUs", self.profile.gpus_per_node, lambda node: node.gpus)
        if answer is not None and answer[0] == "ok" and self.profile.gpus_per_node < most:
            return "note", f"{answer[1]}", "the others are not used; with exclusive: true they are idle"
        return answer

    def ranks_per_node(self) -> Answer:
        p = self.profile
        same = p.tasks_per_node == (p.gpus_per_node or 1)
        return ("ok" if same or not p.gpus_per_node else "note"), f"{p.tasks_per_node}, on {p.gpus_per_node} GPUs"

    def cpus_per_rank(self) -> Answer:
        p = self.profile
        answer = self._of_nodes("CPUs", p.cpus_per_rank * p.tasks_per_node, lambda node: node.cpus)
        least = min((node.cpus for node in self.nodes_here), default=0) // p.tasks_per_node
        if answer is not None and answer[0] == "ok" and p.exclusive and p.cpus_per_rank * 2 <= least:
            return "note", f"{p.cpus_per_rank} per rank", f"the nodes have {least} per rank: decoding is faster with them"
        return answer

    def memory(self) -> Answer:
        if not (needed := limits.megabytes(self.profile.memory)):
            return "ok", "all of a node's"
        return self._of_nodes("MB", needed, lambda node: node.memory)

    def time(self) -> Answer:
        limit = self.partition.get("MaxTime")
        if limit in _UNLIMITED:
            return "ok", f"{self.profile.time}; the partition has no limit"
        most = seconds(str(limit))
        state = "ok" if self.profile.seconds <= most else "bad"
        return state, f"{self.profile.time} of at most {clock(most)}"

    def checkpoint_lead_time(self) -> Answer:
        share = self.profile.checkpoint_lead_time / self.profile.seconds
        return ("ok" if share < 0.25 else "note"), f"{self.profile.checkpoint_lead_time:.0f} s, {share:.0%} of the time"

    def partition_(self) -> Answer:
        known = ", ".join(sorted(self.site.partitions))
        if self.name is None:
            return "bad", "none, and Slurm has no default", f"choose one of {known}"
        if not self.partition:
            return "bad", f"{printable(self.name)} does not exist", f"choose one of {known}"
        state = self.partition.get("State", "UP")
        chosen = "" if self.profile.partition else " (Slurm's default)"
        return ("ok" if state == "UP" else "bad"), f"{self.name}{chosen}, {len(self.nodes_here)} nodes, {state}"

    def account(self) -> Answer:
        own, required = self.profile.account, "associations" in tools.enforced(self.site.settings)
        if self.site.accounts is None:
            return ("note", f"{own}: Slurm keeps no accounts here and takes any name") if own else ("ok", "none is needed")
        known = ", ".join(sorted(self.site.accounts))
        if own is None:
            return ("note" if required else "ok"), "your default account" if known else "none", f"yours: {known}" if known else ""
        allowed = self.partition.get("AllowAccounts")
        if allowed not in _UNLIMITED and own.lower() not in str(allowed).lower().split(","):
            return "bad", f"{own} may not use the partition", f"it admits {allowed}"
        return self._of_user(own, set(self.site.accounts), "an account", required)

    def qos(self) -> Answer:
        own, allowed = self.profile.qos, self.partition.get("AllowQos")
        if own is None:
            return "ok", "the default"
        if allowed not in _UNLIMITED and own.lower() not in str(allowed).lower().split(","):
            return "bad", f"{own} may not be used in the partition", f"it admits {allowed}"
        if self.site.accounts is None:
            return "note", f"{own}: Slurm keeps no accounts here, so it has none"
        known = set().union(*self.site.accounts.values())
        return self._of_user(own, known, "one", "qos" in tools.enforced(self.site.settings))

    def _of_user(self, own: str, known: set[str], what: str, required: bool) -> Answer:
        """Whether a name, in which case does not count, is one of the user's."""
        if own.lower() in known:
            return "ok", own
        if not known:
            return "note", f"{own}: those of yours are not known"
        advice = f"choose one of {', '.join(sorted(known))}"
        return (
            ("bad", f"{own} is not {what} of yours", advice)
            if required
            else ("note", f"{own} is not {what} of yours, which Slurm does not require", advice)
        )

    def constraint(self) -> Answer:
        own = self.profile.constraint
        if own is None:
            return "ok", "none"
        names = re.findall(r"[A-Za-z_][\w.=-]*", own)
        known = set().union(*(node.features for node in self.nodes_here))
        unknown = [name for name in names if name not in known]
        features = f"the nodes have {', '.join(sorted(known))}" if known else "the nodes have no features"
        return ("bad", f"{', '.join(unknown)}: no node has it", features) if unknown else ("ok", own)

    def reservation(self) -> Answer:
        own = self.profile.reservation
        if own is None or own in self.site.reservations:
            return "ok", own or "none"
        known = ", ".join(sorted(self.site.reservations))
        return "bad", f"{own} does not exist", f"choose one of {known}" if known else "there are no reservations"

    def exclusive(self) -> Answer:
        forced = self.partition.get("OverSubscribe") == "EXCLUSIVE"
        if forced and not self.profile.exclusive:
            return "note", "false, and the partition gives entire nodes anyway"
        return "ok", str(self.profile.exclusive).lower()

    def requeue_mode(self) -> Answer:
        mode, own = self.partition.get("PreemptMode") or self.site.settings.get("PreemptMode", "OFF"), self.profile.requeue_mode
        if "CANCEL" in mode and own == "requeue":
            return "bad", f"{own}: preempted jobs are cancelled here (PreemptMode={mode})", "set requeue_mode: successor"
        return "ok", f"{own} (PreemptMode={mode}, JobRequeue={self.site.settings.get('JobRequeue')})"

    def host_python(self) -> Answer:
        program = shutil.which(self.profile.host_python)
        if program is None:
            return "note", f"{self.profile.host_python} is not on this machine; the nodes may have it"
        ask = "import sys; print(*sys.version_info[:2])"
        done = subprocess.run([program, "-I", "-c", ask], capture_output=True, text=True, timeout=60, check=False)
        version = tuple(int(part) for part in done.stdout.split() if part.isdecimal())
        return ("ok" if version >= (3, 9) else "bad"), f"{program}, {'.'.join(map(str, version))} here", ""

    def python(self) -> Answer:
        own = self.profile.python
        if own is None or self.profile.container is not None:
            return "ok", "that of fovea submit" if own is None else own
        return ("ok" if shutil.which(own) else "note"), f"{own}" + ("" if shutil.which(own) else " is not on this machine")

    def environment(self) -> Answer:
        own = self.profile.environment.get("NCCL_SOCKET_IFNAME", "").lstrip("=")
        names = [one.name for one in self.site.interfaces]
        if not own or own.startswith("^"):
            return "ok", f"{len(self.profile.environment)} variables"
        present = [name for name in names if any(name.startswith(part) for part in own.split(","))]
        return ("ok" if present else "note"), f"NCCL_SOCKET_IFNAME={own}; this machine has {', '.join(names)}"

    def container(self) -> Answer:
        own = self.profile.container
        if own is None:
            return "ok", "none"
        if own.image.startswith("/") and not Path(own.image).is_file():
            return "note", f"{own.image} is not on this machine; the nodes must see it"
        return "ok", own.image

    def local_paths(self) -> Answer:
        tmp = self.site.settings.get("TmpFS", "/tmp")
        covered = any(Path(tmp).is_relative_to(path) for path in self.profile.local_paths)
        advice = "" if covered else "a run directory there would be accepted on several nodes"
        return (
            ("ok" if covered or self.profile.nodes == 1 else "note"),
            f"Slurm's TmpFS {tmp} is{'' if covered else ' not'} one",
            advice,
        )

    def preflight(self) -> Answer:
        known, needed = [node.tmp for node in self.nodes_here if node.tmp], self.profile.preflight.disk_gb
        if not known:
            return "note", f"disk_gb {needed:g}: Slurm does not know the size of the nodes' disks"
        return ("ok" if min(known) / 1024 >= needed else "bad"), f"disk_gb {needed:g}; the nodes have {min(known) / 1024:.0f} GB"

    def hang_timeout(self) -> Answer:
        return ("ok" if self.profile.hang_timeout < self.profile.seconds else "note"), f"{self.profile.hang_timeout:.0f} s"

    def gpu_tflops(self) -> Answer:
        types = ", ".join(sorted(set().union(*(node.gpu_types for node in self.nodes_here)))) or "of no named type"
        if not self.profile.gpus_per_node:
            return "ok", "no GPUs"
        own = self.profile.gpu_tflops
        return ("note" if own is None else "ok"), f"{own if own is not None else 'not set'}; the GPUs are {types}"

    def notify(self) -> Answer:
        own = self.profile.notify
        missing = [name for name in own.variables if name not in os.environ]
        if own.email_to and own.smtp is None and shutil.which("sendmail", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            return "note", "the program sendmail is not on this machine", "set notify.smtp"
        if missing:
            return "note", f"{', '.join(missing)} not set in this shell", "the job inherits it from the shell of fovea submit"
        return "ok", "set" if own.channels else "none"


# Fields about which neither Slurm nor this machine knows anything.
OWN = (
    *("options", "exclude_hours", "setup", "export_env", "budgets", "gpu_memory_gb", "gpu_hour_price"),
    *("node_mtbf_hours", "restart_seconds", "checkpoint_gb_per_second"),
)


def compare(profile: ClusterProfile, site: Site) -> Iterator[Finding]:
    """A finding for each field of a profile.

    Args:
        profile: the profile.
        site: what Slurm and this machine say.
    """
    comparison = _Comparison(profile, site)
    for name in ClusterProfile.model_fields:
        if name in OWN:
            continue
        answer: Answer = getattr(comparison, "partition_" if name == "partition" else name)()
        if answer is not None:
            yield answer[0], f"{name}: {printable(answer[1])}", printable(answer[2]) if len(answer) == 3 else ""
    yield "ok", f"not known to Slurm: {', '.join(OWN)}", ""


def bad_fields(findings: Iterable[Finding]) -> set[str]:
    """Names of the fields that :func:`compare` calls bad."""
    return {what.partition(":")[0] for state, what, _ in findings if state == "bad"}
