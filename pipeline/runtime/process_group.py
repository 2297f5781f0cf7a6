"""The process group: set up from explicit addresses, checked, and taken down in the order that does not crash."""

from __future__ import annotations

import os
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

_LOOPBACK = ("127.0.0.1", "localhost")
_NOTICE = 30.0  # seconds after which rank 0 tells what it waits for


@dataclass(frozen=True)
class World:
    """Where this process stands among the ranks of a run.

    Attributes:
        rank, size: global rank and number of ranks.
        local_rank: rank on this node.
        device: this rank's device.
        control: a gloo group for small host-side agreements; ``None`` (the default group) where that is gloo itself.
        local_size: number of ranks on this node.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None
    local_size: int = 1


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
    """Meet the other ranks.

    Args:
        rank, size, local_rank: this process's place.
        address, port: where rank 0 listens.
        key: names this set of ranks and this start of it; ranks with another key on the same port never meet these, nor
            what an earlier start left behind there.
        backend: ``auto`` (NCCL with GPUs, else gloo), ``nccl`` or ``gloo``.
        timeout: seconds a collective may take.
        local_size: number of ranks on this node.

    Raises:
        LaunchError: the ranks do not meet in time, the port is taken, or there is no GPU for NCCL.
    """
    gpus = torch.cuda.device_count() if backend != "gloo" else 0
    chosen = backend if backend != "auto" else ("nccl" if gpus else "gloo")
    if chosen == "nccl" and not gpus:
        raise LaunchError("NCCL needs a GPU and there is none", where="launch.backend", hint="set launch.backend=gloo")
    device = torch.device("cuda", gpu_of(local_rank, local_size, gpus)) if chosen == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    notice = threading.Timer(_NOTICE, _say_waiting, (rank, size, f"{address}:{port}", timeout))
    notice.daemon = True
    if size > 1 and rank == 0:
        notice.start()
    try:
        store = dist.HashStore() if size == 1 else _meet(address, port, size, is_master=rank == 0, limit=limit)
        if device.type == "cuda" and local_size > 1:
            own = (
                f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {torch.cuda.get_device_properties(device).uuid}"
            )
            check_gpus(
                dist.PrefixStore(f"{key}/gpus", store), own, rank, range(rank - local_rank, rank - local_rank + local_size)
            )
        dist.init_process_group(chosen, store=dist.PrefixStore(key, store), rank=rank, world_size=size, timeout=limit)
        control = None if chosen == "gloo" else cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=limit))
        dist.barrier(group=control)
    except (RuntimeError, OSError) as error:
        raise RendezvousError(
            f"rank {rank} of {size} did not meet the others ({str(error).splitlines()[0]})",
            where=f"{address}:{port}",
            hint="see the other ranks' logs; the port must be free and reachable",
        ) from error
    finally:
        notice.cancel()
    return World(rank, size, local_rank, device, control, local_size)


def _say_waiting(rank: int, size: int, where: str, timeout: float) -> None:
    """Somebody whose shell has variables of an old job should not wait for ten minutes to learn of it."""
    told = f"rank {rank} of {size} still waits for the others at {where}, for {timeout:.0f} s at most (launch.timeout)"
    print(f"fovea: {told}. If nobody starts them, unset RANK and WORLD_SIZE", file=sys.stderr, flush=True)


def gpu_of(local_rank: int, local_size: int, gpus: int) -> int:
    """The number of a rank's GPU among those that its process sees.

    A launcher may show each rank all GPUs of its node, or each rank one of its own.

    Raises:
        LaunchError: there are fewer GPUs than ranks.
    """
    if local_rank < gpus:
        return local_rank
    if gpus == 1:
        return 0
    raise LaunchError(
        f"{local_size} ranks run on this node, and {gpus} GPUs are visible",
        where="launch.num_processes",
        hint=f"start {gpus} ranks a node, or let CUDA_VISIBLE_DEVICES show more GPUs",
    )


def check_gpus(store: dist.Store, own: str, rank: int, peers: Iterable[int]) -> None:
    """Refuses ranks of one node that share a GPU.

    Args:
        store: where the ranks tell each other.
        own: names this rank's node and GPU.
        rank: this rank.
        peers: the ranks that may be on the same node.

    Raises:
        LaunchError: another rank has the same GPU.
    """
    store.set(str(rank), own)
    for other in peers:
        if other != rank and store.get(str(other)).decode() == own:
            raise LaunchError(
                f"ranks {min(rank, other)} and {max(rank, other)} would share one GPU ({own})",
                where="GPUs of this node",
                hint="start one rank a GPU; CUDA_VISIBLE_DEVICES says which GPUs a process may use",
            )


def _meet(address: str, port: int, size: int, *, is_master: bool, limit: timedelta) -> dist.TCPStore:
    """The store in which ranks find each other. Ranks of one machine listen on its loopback interface only: by itself torch's
    store takes connections from everywhere, and whoever joins can send pickles."""
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
            # torchrun's own store listens there, which torch then uses.
            return dist.TCPStore(_LOOPBACK[0], port, size, is_master=True, timeout=limit, wait_for_workers=False)
        listening.listen(1024)
        return dist.TCPStore(
            _LOOPBACK[0],
            port,
            size,
            is_master=True,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),  # the store closes it
        )


def leave() -> None:
    """Take the process group down after a clean end; call it after the engine was closed."""
    dist.barrier()
    dist.destroy_process_group()
