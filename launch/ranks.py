"""Who am I among the ranks? Read from the environment of torchrun, of a Slurm step, of fovea's own launcher, or of nobody.

Imports no torch: a rank must know its place before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import LaunchError


@dataclass(frozen=True)
class RankEnvironment:
    """One rank's place.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        local_rank: number of this process on its machine, from 0.
        local_world_size: processes on this machine.
        address: host name or address of rank 0's machine.
        port: TCP port of the rendezvous there; 0 where nobody chose one yet.
        source: who started the ranks: ``torchrun`` (or fovea's local launcher), ``slurm``, or ``single``.
        key: names this set of ranks apart from any other (Slurm: job, restart, step), so that strangers never join.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    source: Literal["torchrun", "slurm", "single"] = "single"
    key: str = "single"

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> RankEnvironment:
        """The place told by ``environment`` (default: this process's).

        ``RANK`` wins. ``SLURM_PROCID`` alone says nothing, since a batch script has it too: only inside a step, where
        ``SLURM_STEP_ID`` is set to a number, is this process one of the step's tasks.

        Raises:
            LaunchError: variables that are missing, no numbers, or contradict each other.
        """
        env = os.environ if environment is None else environment
        if "RANK" in env:
            found = cls(
                rank=_number(env, "RANK"),
                world_size=_number(env, "WORLD_SIZE"),
                local_rank=_number(env, "LOCAL_RANK", env.get("SLURM_LOCALID", "0")),
                # DeepSpeed's launcher calls it LOCAL_SIZE.
                local_world_size=_number(env, "LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1")),
                address=env.get("MASTER_ADDR", "127.0.0.1"),
                port=_number(env, "MASTER_PORT", "0"),
                source="torchrun",
                key=env.get("FOVEA_KEY") or _elastic_key(env),
            )
        elif env.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in env:
            found = cls._of_slurm(env)
        else:
            return cls()
        if not 0 <= found.rank < found.world_size or not 0 <= found.local_rank < found.local_world_size:
            raise LaunchError(
                f"rank {found.rank} of {found.world_size}, local rank {found.local_rank} of {found.local_world_size} cannot be",
                where=f"environment of {found.source}",
                hint="Unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or start the ranks with fovea, srun or torchrun.",
            )
        return found

    @classmethod
    def _of_slurm(cls, env: Mapping[str, str]) -> RankEnvironment:
        world = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        tasks = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        node = _number(env, "SLURM_NODEID", "0")
        local_rank = _number(env, "SLURM_LOCALID", "0")
        address = env.get("MASTER_ADDR") or env.get("SLURM_LAUNCH_NODE_IPADDR", "")
        world_size = _number(env, world)
        if not address and world_size > 1:
            raise LaunchError(
                "nobody says where rank 0 is", where="Slurm step", hint="Export MASTER_ADDR with the address of the first node."
            )
        key = ".".join((env.get("SLURM_JOB_ID", "0"), env.get("SLURM_RESTART_COUNT", "0"), env["SLURM_STEP_ID"]))
        return cls(
            rank=_number(env, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=tasks[node] if node < len(tasks) else local_rank + 1,
            address=address or "127.0.0.1",
            port=_number(env, "MASTER_PORT", "0"),
            source="slurm",
            key=key,
        )

    def variables(self) -> dict[str, str]:
        """The variables that torch, DeepSpeed and Accelerate read. Without ``RANK``, DeepSpeed would look for MPI."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "FOVEA_KEY": self.key,
        }


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    if text is None:
        raise LaunchError(f"{name} is not set", where="environment", hint="Start the ranks with fovea, srun or torchrun.")
    if not text.isascii() or not text.isdigit():
        raise LaunchError(
            f"{name} = {text!r} is no number", where="environment", hint=f"Unset {name}, or let the launcher set it."
        )
    return int(text)


def _elastic_key(env: Mapping[str, str]) -> str:
    """torchrun's store outlives a restart of the ranks, so each restart needs a name of its own in it."""
    return f"{env.get('TORCHELASTIC_RUN_ID') or 'torchrun'}.{env.get('TORCHELASTIC_RESTART_COUNT') or 0}"


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's ``4(x2),3`` as one number a node; empty if it cannot be read."""
    tasks: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, times = part.partition("(x")
        repeat = times.removesuffix(")") or "1"
        if not count.isdigit() or not repeat.isdigit():
            return []
        tasks += [int(count)] * int(repeat)
    return tasks
