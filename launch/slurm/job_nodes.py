"""Which nodes of a job train and which stand by. Standard library only."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping

from launch.slurm import slurm_commands as tools
from pipeline.errors import LaunchError


class JobNodes:
    """The nodes of a job. Slurm takes lost ones out of it, if the job has nodes that stand by (``sbatch --no-kill``).

    Args:
        job: job ID.
        needed: number of nodes that train.
        spare: number that stand by.
        environment: the batch step's environment.
    """

    def __init__(self, job: int, needed: int, spare: int, environment: Mapping[str, str]) -> None:
        self._job, self._needed, self._spare = job, needed, spare
        self._bad = set[str]()
        try:
            self._all = tools.nodes(environment.get("SLURM_JOB_NODELIST", ""))
        except LaunchError:  # then they are not known by name
            self._all = []
        self._first = self._all[0] if self._all else ""

    @property
    def usable(self) -> list[str]:
        """Those that are there and not at fault."""
        return [node for node in self._all if node not in self._bad]

    @property
    def training(self) -> list[str]:
        """Those that train."""
        return self.usable[: self._needed]

    @property
    def enough(self) -> bool:
        """Whether so many are left as are needed, the first one among them, where the supervisor runs and the ranks meet."""
        return not self._spare or (len(self.training) == self._needed and self._first not in self._bad)

    def drop(self, bad: Container[str]) -> str:
        """Look which nodes are still there, and leave out some; returns the change in words, empty if there is none.

        Args:
            bad: nodes at fault.
        """
        if not self._spare:
            return ""
        before = self.training
        with contextlib.suppress(LaunchError):  # Slurm does not answer: srun will tell
            self._all = tools.nodes(tools.facts(self._job).get("NodeList", "")) or self._all
        self._bad |= {node for node in self._all if node in bad}
        gone = ", ".join(node for node in before if node not in self.training)
        new = ", ".join(node for node in self.training if node not in before)
        if not gone:
            return ""
        return f"{new} takes the place of {gone}" if self.enough else f"no node takes the place of {gone}"

    def step_options(self, *, all_usable: bool = False) -> list[str]:
        """Options of ``srun`` that start a step on those that train, or on those that stand by too."""
        names = self.usable if all_usable else self.training
        return [f"--nodelist={','.join(names)}"] if self._spare and names else []

    def variables(self) -> dict[str, str]:
        """Variables that tell ``srun`` which nodes the job still has."""
        if not self._spare or not self._all:
            return {}
        names, count = ",".join(self.usable), str(len(self.usable))
        return {"SLURM_JOB_NODELIST": names, "SLURM_NODELIST": names, "SLURM_JOB_NUM_NODES": count, "SLURM_NNODES": count}
