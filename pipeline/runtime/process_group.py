"""Initializes, checks and destroys the torch.distributed process group."""

from __future__ import annotations

import os
import resource
import socket
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from pipeline.errors import LaunchError, RendezvousError
from pipeline.runtime.gpus import shown

_LOOPBACK = ("127.0.0.1", "localhost")
_MESH = 32  # ranks up to which gloo connects each with each at the start
_NOTICE = 30.0  # seconds after which rank 0 reports which ranks are missing


@dataclass(frozen=True)
class World:
    """Position of this process among the ranks of a run.

    Attributes:
        rank, size: global rank and world size.
        local_rank: rank on this node.
        device: this rank's device.
        control: gloo group for small collectives on the host; ``None`` (the default group) if that is gloo itself.
        local_size: number of ranks on this node.
        store: key-value store of this set of ranks, for counters that they share without a collective.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None
    local_size: int = 1
    store: dist.Store | None = None


def join(
    *,
    rank: int,
    size: int,
    local_rank: int,
    address: str,
    port: int,
    key: str,
    backend: str = "auto",
    timeout: float = 600.0,
    local_size: int = 1,
) -> World:
    """Initializes the process group.

    Args:
        rank, size, local_rank: global rank, world size, and rank on this node.
        address, port: where rank 0 listens.
        key: identifies this set of ranks and this start; ranks with another key on the same port do not connect to these, nor
            do leftovers of an earlier start.
        backend: ``auto`` (NCCL with GPUs, else gloo), ``nccl`` or ``gloo``.
        timeout: timeout of a collective, seconds.
        local_size: number of ranks on this node.

    Raises:
        LaunchError: the ranks do not connect in time, the port is in use, or there is no GPU for NCCL or for this rank.
    """
    gpus = torch.cuda.device_count() if backend != "gloo" else 0
    chosen = backend if backend != "auto" else ("nccl" if gpus else "gloo")
    if chosen == "nccl" and not gpus:
        raise LaunchError(
            f"NCCL needs a GPU and rank {rank} sees none{shown()}",
            where=f"launch.backend on {socket.gethostname()}",
            hint="Set launch.backend=gloo, or let CUDA_VISIBLE_DEVICES show a GPU to each rank",
        )
    device = torch.device("cuda", gpu_of(local_rank, local_size, gpus)) if chosen == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > _MESH:
        # Otherwise each rank reads the addresses of all connections of all ranks from rank 0's store: bytes that grow with the
        # cube of the world size. Collectives connect a rank with few others.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        allow_files(4 * size + 1024)  # rank 0 has connections to all others: to its store, and to gather what they send
    limit = timedelta(seconds=timeout)
    notice = threading.Timer(_NOTICE, _report_waiting, (rank, size, f"{address}:{port}", timeout))
    notice.daemon = True
    if size > 1 and rank == 0:
        notice.start()
    try:
        store = dist.HashStore() if size == 1 else _meet(address, port, size, is_master=rank == 0, limit=limit)
        if size > 1:
            check_backends(dist.PrefixStore(f"{key}/backends", store), chosen, rank)
        if device.type == "cuda" and local_size > 1:
            peers = range(rank - local_rank, rank - local_rank + local_size)
            check_gpus(dist.PrefixStore(f"{key}/gpus", store), _gpu_name(device), rank, peers)
        dist.init_process_group(chosen, store=dist.PrefixStore(key, store), rank=rank, world_size=size, timeout=limit)
        control = None if chosen == "gloo" else cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=limit))
        dist.barrier(group=control)
    except (RuntimeError, OSError) as error:
        raise RendezvousError(
            f"rank {rank} of {size} could not connect to the others ({str(error).splitlines()[0]})",
            where=f"{address}:{port}",
            hint="See the other ranks' logs; the port must be free and reachable",
        ) from error
    finally:
        notice.cancel()
    return World(rank, size, local_rank, device, control, local_size, dist.PrefixStore(f"{key}/shared", store))


def allow_files(count: int) -> None:
    """Raises this process's limit of open files to a number, as far as the hard limit permits; it is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def _report_waiting(rank: int, size: int, where: str, timeout: float) -> None:
    """Reports that ranks are missing, so that stale variables of an old job are noticed before the timeout of ten minutes."""
    text = f"rank {rank} of {size} still waits for the others at {where}, for {timeout:.0f} s at most (launch.timeout)"
    print(f"fovea: {text}. If no launcher starts them, unset RANK and WORLD_SIZE", file=sys.stderr, flush=True)


def gpu_of(local_rank: int, local_size: int, gpus: int) -> int:
    """Returns the index of a rank's GPU among those visible to its process.

    A launcher may show each rank all GPUs of its node, or only one.

    Raises:
        LaunchError: there are fewer GPUs than ranks.
    """
    if local_rank < gpus:
        return local_rank
    if gpus == 1:
        return 0
    raise LaunchError(
        f"local rank {local_rank} has no GPU of its own: {local_size} ranks run on this node, "
        f"but {gpus} GPUs are visible{shown()}",
        where=f"launch.num_processes on {socket.gethostname()}",
        hint=f"Start {gpus} ranks per node, or let CUDA_VISIBLE_DEVICES show more GPUs",
    )


def _gpu_name(device: torch.device) -> str:
    """Name of a GPU that is unique over nodes and does not depend on which others its process sees.

    A part of a GPU (MIG) may have the identifier of the whole, so that the variable that selects it is part of the name.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    part = f" {chosen}" if chosen.startswith("MIG-") else ""
    return f"{socket.gethostname()}{part} {torch.cuda.get_device_properties(device).uuid}"


def check_backends(store: dist.Store, own: str, rank: int) -> None:
    """Rejects a rank that would use another backend than rank 0: one of them sees GPUs, the other does not.

    Args:
        store: key-value store shared by the ranks.
        own: this rank's backend.
        rank: this rank.

    Raises:
        LaunchError: the backends differ; else the ranks would wait for each other until the timeout.
    """
    if rank == 0:
        store.set("0", own)
    elif (first := store.get("0").decode()) != own:
        raise LaunchError(
            f"rank {rank} would use {own} and rank 0 {first}: only one of them sees GPUs{shown()}",
            where=socket.gethostname(),
            hint="Set CUDA_VISIBLE_DEVICES so that all ranks see GPUs, or set launch.backend=gloo",
        )


def check_gpus(store: dist.Store, own: str, rank: int, peers: Iterable[int]) -> None:
    """Rejects ranks of one node that share a GPU.

    Args:
        store: key-value store shared by the ranks.
        own: identifies this rank's node and GPU.
        rank: this rank.
        peers: the ranks that may be on the same node.

    Raises:
        LaunchError: another rank has the same GPU.
    """
    store.set(str(rank), own)
    for other in peers:
        if other != rank and store.get(str(other)).decode() == own:
            raise LaunchError(
                f"ranks {min(rank, other)} and {max(rank, other)} would share a GPU ({own})",
                where="GPUs of this node",
                hint="Start one rank per GPU; CUDA_VISIBLE_DEVICES says which GPUs a process may use",
            )


def _meet(address: str, port: int, size: int, *, is_master: bool, limit: timedelta) -> dist.TCPStore:
    """Creates the store for rendezvous. Ranks of a single node listen on the loopback interface only: by default, torch's store
    accepts connections from everywhere, and any client can send pickles.
    """
    if address not in _LOOPBACK:
        return dist.TCPStore(address, port, size, is_master=is_master, timeout=limit, wait_for_workers=False)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not is_master:
        return dist.TCPStore(_LOOPBACK[0], port, size, is_master=False, timeout=limit, wait_for_workers=False)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((_LOOPBACK[0], port))
        except OSError:
            if not os.environ.get("TORCHELASTIC_USE_AGENT_STORE"):
                raise
            # torchrun's own store listens there, and torch uses it.
            return dist.TCPStore(_LOOPBACK[0], port, size, is_master=True, timeout=limit, wait_for_workers=False)
        listening.listen(1024)
        return dist.TCPStore(
            _LOOPBACK[0],
            port,
            size,
            is_master=True,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),  # the store closes the descriptor
        )


def leave() -> None:
    """Destroys the process group after a regular end. Call it after closing the engine."""
    dist.barrier()
    dist.destroy_process_group()
