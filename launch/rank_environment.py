"""Determines rank and world size from the environment: torchrun, a Slurm step, fovea's own launcher, or a single process.

Does not import torch: a rank must know its place before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from launch.hostlist import hosts
from pipeline.errors import LaunchError
from pipeline.runtime.gpus import gpus, shown
from pipeline.untrusted import printable


@dataclass(frozen=True)
class RankEnvironment:
    """Rank, world size and rendezvous address of this process.

    Attributes:
        rank: global rank, from 0.
        world_size: number of processes.
        local_rank: rank on its node, from 0.
        local_world_size: processes on this node.
        address: host name or address of rank 0's node.
        port: TCP port of the rendezvous there; 0 for a single rank, which needs none.
        source: what started the ranks: ``torchrun`` (or fovea's local launcher), ``slurm``, or ``single``.
        key: unique name of this set of ranks (Slurm: job, restart, step), so that ranks of another run cannot join.
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
        """Read ``environment`` (default: this process's).

        ``RANK`` takes precedence. ``SLURM_PROCID`` alone is not sufficient, since a batch script has it too: only inside a step,
        where ``SLURM_STEP_ID`` is a number, is this process one of the step's tasks.

        Raises:
            LaunchError: variables are missing, not numbers, or contradictory.
        """
        env = os.environ if environment is None else environment
        if "RANK" in env:
            rank_environment = cls(
                rank=_number(env, "RANK"),
                world_size=_number(env, "WORLD_SIZE"),
                local_rank=_number(env, "LOCAL_RANK", env.get("SLURM_LOCALID", "0")),
                # DeepSpeed's launcher calls it LOCAL_SIZE.
                local_world_size=_number(env, "LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1")),
                address=env.get("MASTER_ADDR", "127.0.0.1"),
                port=_number(env, "MASTER_PORT", "0" if env.get("WORLD_SIZE") == "1" else "29500"),
                source="torchrun",
                key=env.get("FOVEA_KEY") or _elastic_key(env),
            )
        elif env.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in env:
            rank_environment = cls._of_slurm(env)
        else:
            return cls()
        if rank_environment.source == "torchrun" and rank_environment.world_size > 1 and rank_environment.port == 0:
            raise LaunchError(
                "MASTER_PORT is 0, so the ranks cannot find each other",
                where="environment",
                hint="Start with torchrun --standalone, which chooses a free port and passes it to the ranks; "
                "--master-port=0 does not",
            )
        if (
            not 0 <= rank_environment.rank < rank_environment.world_size
            or not 0 <= rank_environment.local_rank < rank_environment.local_world_size
        ):
            raise LaunchError(
                f"rank {rank_environment.rank} of {rank_environment.world_size}, local rank {rank_environment.local_rank} of "
                f"{rank_environment.local_world_size} is impossible",
                where=f"environment of {rank_environment.source}",
                hint="Unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or start the ranks with fovea, srun or torchrun",
            )
        return rank_environment

    @classmethod
    def _of_slurm(cls, env: Mapping[str, str]) -> RankEnvironment:
        world = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        tasks = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        node = _number(env, "SLURM_NODEID", "0")
        local_rank = _number(env, "SLURM_LOCALID", "0")
        world_size = _number(env, world)
        if world_size > 1 and "SLURM_PTY_PORT" in env:
            raise LaunchError(
                f"this is task 0 of {world_size} of an interactive step; Slurm does not start the others",
                where="srun --pty",
                hint="Request one task (srun --ntasks=1 --pty), in which fovea starts the ranks, or leave --pty out",
            )
        address = _address_of_slurm(env) if world_size > 1 else "127.0.0.1"
        key = ".".join((env.get("SLURM_JOB_ID", "0"), env.get("SLURM_RESTART_COUNT", "0"), env["SLURM_STEP_ID"]))
        return cls(
            rank=_number(env, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=tasks[node] if node < len(tasks) else local_rank + 1,
            address=address,
            port=_number(env, "MASTER_PORT", str(_port_of(key))) if world_size > 1 else 0,
            source="slurm",
            key=key,
        )

    def variables(self) -> dict[str, str]:
        """The variables that torch, DeepSpeed and Accelerate read. Without ``RANK``, DeepSpeed would try MPI."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "FOVEA_KEY": self.key,
        }


def ranks_to_start(
    here: RankEnvironment,
    requested: int | None,
    *,
    where: str,
    on_cpu: bool = False,
    default: str = "",
    environment: Mapping[str, str] | None = None,
) -> int:
    """Number of ranks that this process starts on its node; 0 if it is a rank itself.

    Args:
        here: this process's rank environment.
        requested: number of ranks; ``None`` leaves it to launcher and GPUs.
        where: the setting or option that holds ``requested``, for the message.
        on_cpu: no GPU is going to be used.
        default: the file that holds ``requested``, if it was not chosen for this start: launcher and GPUs take precedence, and
            a line is printed.
        environment: environment variables; this process's by default.

    Raises:
        LaunchError: the launcher's number of processes contradicts the requested one, or there are fewer GPUs than ranks.
    """
    env = os.environ if environment is None else environment
    gpu_count = 0 if on_cpu else gpus(env)
    if here.source == "single":
        _refuse_mpi(env)
        return _enough(requested or gpu_count or 1, gpu_count, where, env, default)
    if "FOVEA_ATTEMPT" in env or "FOVEA_KEY" in env:  # started by fovea itself, which has already checked
        return 0
    if here.world_size == 1 and here.source == "slurm" and 1 < (requested or gpu_count) <= gpu_count:
        return requested or gpu_count  # a shell on a node: srun --gres=gpu:8 --pty bash
    if here.world_size == 1 and here.source == "slurm" and "SLURM_PTY_PORT" in env and requested and requested > 1 > gpu_count:
        return requested  # such a shell on a node without GPUs
    if requested is not None and requested != here.world_size and default and (here.source == "slurm" or "LOCAL_RANK" in env):
        if here.rank == 0:
            without = f"{where} = {requested} of {default} is for starts without a launcher"
            _print(f"{here.source} started {_ranks(here.world_size)}; {without}")
    elif requested is not None and requested != here.world_size:
        names = "SLURM_STEP_NUM_TASKS" if here.source == "slurm" else "WORLD_SIZE"
        start = f"srun --ntasks={requested}" if here.source == "slurm" else f"torchrun --nproc-per-node={requested}"
        leave = f"leave {where} out" if where.startswith("-") else f"set {where}=null"
        stray = "; unset RANK and WORLD_SIZE if no launcher started this process" if here.source == "torchrun" else ""
        raise LaunchError(
            f"{where} = {requested}, but this process is rank {here.rank} of {here.world_size} ({names}={here.world_size})",
            where=f"environment of {here.source}",
            hint=f"Start as many ({start}), or {leave} to take the launcher's number{stray}",
        )
    if here.world_size == 1 and gpu_count > 1:
        _print(f"{gpu_count - 1} of {gpu_count} GPUs stay idle: the launcher started one process only")
    return 0


def _print(text: str) -> None:
    print(f"fovea: {printable(text)}", file=sys.stderr, flush=True)


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _enough(ranks: int, gpu_count: int, where: str, env: Mapping[str, str], default: str) -> int:
    if 0 < gpu_count < ranks and default:
        _print(f"{_ranks(gpu_count)}, one a visible GPU{shown(env)}, instead of {where} = {ranks} of {default}")
        return gpu_count
    if 0 < gpu_count < ranks:
        raise LaunchError(
            f"{where} = {ranks}, but {gpu_count} GPU{'s are' if gpu_count > 1 else ' is'} visible{shown(env)}",
            where="GPUs of this machine",
            hint=f"Set {where}={gpu_count}, or launch.backend=gloo for ranks without GPUs",
        )
    return ranks


def _refuse_mpi(env: Mapping[str, str]) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if env.get(name, "1").isdigit() and int(env.get(name, "1")) > 1:
            raise LaunchError(
                f"{env[name]} processes were started by MPI ({name}), each of which would start the entire run",
                where="environment",
                hint="Use `fovea train` without mpirun, which starts a rank on each GPU, or use torchrun or srun",
            )


def _address_of_slurm(env: Mapping[str, str]) -> str:
    """Address of rank 0: the first node of the step. The host where srun was typed may be a login node.

    A job's supervisor starts its ranks from the first node, and node names need not resolve: its address is used then.
    """
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    launched = env.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if "FOVEA_ATTEMPT" in env and launched:
        return launched
    try:
        first = list(islice(hosts(env.get("SLURM_STEP_NODELIST", "")), 2))
    except ValueError:
        first = []
    if env.get("SLURM_STEP_NUM_NODES") == "1" or (len(first) == 1 and "SLURM_STEP_NUM_NODES" not in env):
        return "127.0.0.1"
    if first and (not launched or _resolves(first[0])):
        return first[0]
    if launched:
        return launched
    raise LaunchError(
        "the address of rank 0 is unknown", where="Slurm step", hint="Export MASTER_ADDR with the address of the first node"
    )


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def _port_of(key: str) -> int:
    """A port specific to the step, the same on all its ranks, above the range for outgoing connections."""
    return 61001 + int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % (65536 - 61001)


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    if text is None:
        raise LaunchError(f"{name} is not set", where="environment", hint="Start the ranks with fovea, srun or torchrun")
    if not text.isascii() or not text.isdigit():
        raise LaunchError(
            f"{name} = {text!r} is not a number", where="environment", hint=f"Unset {name}, or let the launcher set it"
        )
    return int(text)


def _elastic_key(env: Mapping[str, str]) -> str:
    """torchrun's store persists over restarts of the ranks, so that each restart needs a unique key in it."""
    return f"{env.get('TORCHELASTIC_RUN_ID') or 'torchrun'}.{env.get('TORCHELASTIC_RESTART_COUNT') or 0}"


def _tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's ``4(x2),3`` to one number per node; empty if it cannot be parsed."""
    tasks: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, times = part.partition("(x")
        repeat = times.removesuffix(")") or "1"
        if not count.isdigit() or not repeat.isdigit():
            return []
        tasks += [int(count)] * int(repeat)
    return tasks
