"""All kinds of fault, by name."""

from __future__ import annotations

from pipeline.bench.chaos import disk_faults, process_faults, server_faults, slurm_faults
from pipeline.bench.chaos.kinds import Kind

_TABLES = (process_faults.KINDS, disk_faults.KINDS, server_faults.KINDS, slurm_faults.KINDS)


def catalogue() -> dict[str, Kind]:
    """All kinds by name, in the order of the page."""
    return {kind.name: kind for table in _TABLES for kind in table}
