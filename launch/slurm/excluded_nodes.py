"""Nodes that a run avoids: for a time, and never so many that too few are left. Standard library only."""

from __future__ import annotations

from typing import Any

from launch.slurm import slurm_commands as tools
from pipeline.errors import LaunchError
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory


def avoid(run: RunDirectory, facts: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Nodes to exclude now, and those that are not excluded since too few nodes would be left; the oldest are forgiven first.

    Args:
        run: the run directory.
        facts: as :func:`launch.slurm.render.facts` returns them.
    """
    nodes = list(record.excluded(run))  # in order of time
    if not nodes:
        return [], []
    partition = (facts.get("profile") or {}).get("partition")
    try:
        present = tools.partition_nodes(partition)
    except LaunchError:
        return sorted(nodes), []
    allowed = max(len(present) - int(facts.get("nodes", 1)), 0)
    here = [node for node in nodes if node in present]
    kept = here[len(here) - min(allowed, len(here)) :]
    return sorted(kept), sorted(set(here) - set(kept))
